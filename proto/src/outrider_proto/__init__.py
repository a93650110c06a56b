"""The wire contract between Outrider's programs: messages, codecs, limits.

Imports nothing of either program. The messages are generated from v1/*.proto.
"""
