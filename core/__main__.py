"""python -m adaptc."""

from adaptc.cli.main import main

raise SystemExit(main())
