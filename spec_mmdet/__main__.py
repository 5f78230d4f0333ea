"""Run ``python -m spec_mmdet COMMAND`` as ``spec-mmdet COMMAND``."""

from .commands import main

if __name__ == '__main__':
    main()
