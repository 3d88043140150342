import sys

from m3kernels.cli import main

sys.exit(main())
