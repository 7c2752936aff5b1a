"""Methods on many tasks side by side: the accuracy on each, and the means of their groups (the paper's Table 6)."""

from collections.abc import Mapping, Sequence

from sd_atoms.report.classifier import ClassifierRow, failures_markdown, share_text
from sd_atoms.report.markdown import escaped, table
from sd_atoms.report.table import csv_text

MEAN = "mean"


def group_means(
    by_task: Mapping[str, Sequence[ClassifierRow]], groups: Mapping[str, str], of: str = "test"
) -> dict[str, dict[str, float | None]]:
    """Method -> group -> mean accuracy, test or train, over its tasks, and under "mean" that over the groups.

    None where a task of the group, or a group, has none: a mean over fewer tasks is another figure.

    Args:
        by_task: task -> the rows of its methods.
        groups: task -> its group.
        of: whose accuracy, test or train.
    """
    found: dict[str, dict[str, float | None]] = {}
    for method in dict.fromkeys(row.method for rows in by_task.values() for row in rows):
        accuracy = {
            name: getattr(row, of)[0] for name, rows in by_task.items() for row in rows if row.method == method
        }
        means: dict[str, float | None] = {}
        for group in dict.fromkeys(groups.values()):
            members = [name for name, own in groups.items() if own == group]
            whole = all(name in accuracy for name in members)
            means[group] = sum(accuracy[name] for name in members) / len(members) if whole else None
        known = [value for value in means.values() if value is not None]
        found[method] = means | {MEAN: sum(known) / len(known) if len(known) == len(means) else None}
    return found


def mean_rows(by_task: Mapping[str, Sequence[ClassifierRow]], groups: Mapping[str, str]) -> list[ClassifierRow]:
    """For each method that is done on every task a row of means over the groups' means."""
    means, of_train, rows = group_means(by_task, groups), group_means(by_task, groups, "train"), []
    for method, own in means.items():
        if own[MEAN] is None:
            continue
        found = [row for task in by_task.values() for row in task if row.method == method]
        count, train = len(found), of_train[method][MEAN]
        rows.append(
            ClassifierRow(
                method=method,
                seeds=min(row.seeds for row in found),
                parameters=round(sum(row.parameters for row in found) / count),
                head=round(sum(row.head for row in found) / count),
                test=(own[MEAN], None, None),
                train=(train, None, None),
                gap=(train - own[MEAN], None, None),
                calibration=sum(row.calibration for row in found) / count,
                seconds=sum(row.seconds for row in found) / count,
                memory_gb=max(row.memory_gb for row in found),
            )
        )
    return rows


def tasks_markdown(
    title: str, by_task: Mapping[str, Sequence[ClassifierRow]], groups: Mapping[str, str], failed: Mapping[str, str]
) -> str:
    """The table, a column for each task and each group, and what they mean."""
    means, kinds = group_means(by_task, groups), dict.fromkeys(groups.values())
    lines = []
    for method, own in means.items():
        found = {name: row for name, rows in by_task.items() for row in rows if row.method == method}
        heads = round(sum(row.head for row in found.values()) / len(found))
        parameters = round(sum(row.parameters for row in found.values()) / len(found))
        lines.append(
            [
                escaped(method), f"{parameters:,}", f"{parameters + heads:,}",
                *(share_text(found[name].test) if name in found else "–" for name in by_task),
                *("–" if own[kind] is None else f"{100 * own[kind]:.1f}" for kind in (*kinds, MEAN)),
            ]
        )  # fmt: skip
    header = ["method", "parameters", "with head", *map(escaped, by_task), *kinds, MEAN]
    parts = [f"# {escaped(title)}", table(header, lines, right=[False, *[True] * (len(header) - 1)])]
    parts.append(
        "Test accuracies in percent; ± is half an interval of 95 %, the wider one of two: over images and over seeds. "
        "mean: of the groups' means. parameters: trained besides the head, mean over the tasks."
    )
    return "\n\n".join(parts + failures_markdown(failed)) + "\n"


def tasks_csv(by_task: Mapping[str, Sequence[ClassifierRow]]) -> str:
    """The same for other programs, a line for each task and method."""
    header = ["task", "method", "seeds", "parameters", "head", "test", "test low", "test high", "train", "seconds"]
    cells = [
        [name, row.method, row.seeds, row.parameters, row.head, *row.test, row.train[0], row.seconds]
        for name, rows in by_task.items()
        for row in rows
    ]
    return csv_text(header, cells)
