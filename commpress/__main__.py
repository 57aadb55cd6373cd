"""The `commpress` command as a module: `python -m commpress train`, where the console script is not on the path."""

import commpress

if __name__ == "__main__":
    commpress.launch.cli.main()
