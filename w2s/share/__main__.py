"""Share a finished run: write RUN/hub with its weights, record and model card, and push it to the hub.

python -m w2s.share RUN                    look at RUN/hub/README.md first
python -m w2s.share RUN --repo NAME        write it and push it
"""

import argparse
import sys
from pathlib import Path

try:
    from w2s.engine.errors import InputError
    from w2s.engine.sharing import check_hub, push, share_folder
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m w2s.share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--repo", metavar="NAME", help="repository on the hub, made if it is not there: [USER/]NAME")
    args = parser.parse_args(argv)
    try:
        if args.repo:
            check_hub(args.repo, option="--repo")
            print(push(args.run, args.repo))
        else:
            print(share_folder(args.run))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
