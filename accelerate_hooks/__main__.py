import sys

from accelerate_hooks.cli import main

sys.exit(main())
