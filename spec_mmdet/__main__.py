"""python -m spec_mmdet COMMAND: what spec-mmdet COMMAND is."""

from .commands import main

if __name__ == '__main__':
    main()
