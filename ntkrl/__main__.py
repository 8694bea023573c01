"""`python -m ntkrl`."""

import sys

from ntkrl.main import main

sys.exit(main())
