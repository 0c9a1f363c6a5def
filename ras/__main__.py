"""`python -m ras`: the command line without its installed script."""

from .cli import main

raise SystemExit(main())
