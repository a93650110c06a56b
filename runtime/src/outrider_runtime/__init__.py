"""What both of Outrider's programs need to run: settings, logs, life, health, metrics, discovery.

Knows neither program, nor the wire contract.
"""
