"""Read a finished run of `clmerge fit` in Python: figures, weights, task vectors and pictures.

python examples/read_a_run.py runs/NAME
"""

import sys

from clmerge import load_run


def main(path: str) -> None:
    """Print what a run found, and draw how its tasks were forgotten."""
    run = load_run(path)
    print(f"{len(run.results.tasks)} tasks, models {', '.join(run.models)}")
    for record in run.figures():  # pandas.DataFrame(run.figures()) is the table
        if record["setting"] == run.results.evaluation:
            print(f"{record['model']:16} last {record['last']:.3f}  forgetting {record['forgetting']:.3f}")
    best = run.results.best_merger()
    if best is not None:
        print(f"R of {best}:\n{run.matrix(best).round(3)}")
        print(f"{sum(tensor.numel() for tensor in run.state_dict(best).values()):,} numbers in its final weights")
    squares = sum(float(tensor.square().sum()) for tensor in run.task_vectors[0].values())
    print(f"norm of the first task vector: {squares**0.5:.3f}")
    run.plot("forgetting_curves").savefig("forgetting.png")


if __name__ == "__main__":
    main(sys.argv[1])
