"""`python -m finetune_trainer prepare | train`: the two programs of a job, which read $FINETUNE_RUN_CONFIG.

And `nettest`, which belongs to no job.
"""

import sys

USAGE = "usage: python -m finetune_trainer prepare|train|nettest"


def main(arguments: list[str]) -> int:
    # Imported where needed: PID 1 of the gang has no use for what reads data, nor the other way round.
    match arguments:
        case ["prepare"]:
            from finetune_trainer.prepare import main as prepare

            return prepare()
        case ["train"]:
            from finetune_trainer.launch import main as train

            return train()
        case ["nettest"]:
            from finetune_trainer.nettest import main as nettest

            return nettest()
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
