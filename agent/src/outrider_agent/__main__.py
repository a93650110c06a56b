"""`python -m outrider_agent` is `outrider-agent`."""

from outrider_agent.main import main

raise SystemExit(main())
