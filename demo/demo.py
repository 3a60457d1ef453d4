"""Draw predictions on images, videos and the webcam: ``python demo/demo.py --help``."""

import sys

from sparseinst.tools.demo import main

if __name__ == "__main__":
    sys.exit(main())
