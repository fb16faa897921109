"""Scores and comparisons as lines of text, for the command line."""

from univg_nb.paper import TASK_COLUMN


def _name(task: str) -> str:
    """The paper's column, or the task's own name; the zero-shot files give none."""
    return TASK_COLUMN.get(task, task) or "(no task)"


def score_table(result: dict) -> str:
    """scores.json as a table: a line per task, then the averages."""
    lines = [
        f"{'task':<18}{'n':>6}{'Acc@0.5':>9}{'95 % interval':>16}"
        f"{'@0.3':>7}{'@0.7':>7}{'mIoU':>7}  replies"
    ]
    for task, row in [*result["tasks"].items(), ("pooled", result["pooled"])]:
        notes = {k: v for k, v in row["status"].items() if k != "ok"}
        notes |= {"missing": row["missing"]} if row["missing"] else {}
        text = ", ".join(f"{k} {v}" for k, v in notes.items()) or "all ok"
        if not row["n"]:
            lines.append(f"{_name(task):<18}{0:>6}  {text}")
            continue
        low, high = row["ci_05"]
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['acc_05']:>9.1%}"
            f"{f'{low:.1%} .. {high:.1%}':>16}{row['acc_03']:>7.1%}"
            f"{row['acc_07']:>7.1%}{row['mean_iou']:>7.3f}  {text}"
        )
    if result["macro_acc_05"] is not None:
        lines.append(f"macro Acc@0.5 (the paper's AVG): {result['macro_acc_05']:.2%}")
    return "\n".join(lines)


def expected_table(result: dict) -> str:
    """Expected scores of sampled replies (scoring.expected) as a table."""
    lines = [
        f"{'task':<18}{'n':>6}{'replies':>9}{'E[IoU]':>16}{'Acc@0.5':>9}{'best':>7}"
    ]
    for task, row in [*result["tasks"].items(), ("pooled", result["pooled"])]:
        mean = f"{row['mean_iou']:.3f} ± {row['se_iou']:.3f}"
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['replies']:>9}"
            f"{mean:>16}{row['acc_05']:>9.1%}{row['best_iou']:>7.3f}"
        )
    return "\n".join(lines)


def compare_table(result: dict) -> str:
    """A comparison as lines of text; differences are B minus A."""
    lines = [
        f"{'task':<18}{'n':>6}{'A':>8}{'B':>8}{'B - A':>8}{'95 % interval':>18}"
        f"{'only A':>8}{'only B':>8}{'McNemar p':>11}{'d mIoU':>9}"
    ]
    for task, row in [*result["tasks"].items(), ("overall", result["overall"])]:
        difference, test = row["acc_05"], row["mcnemar"]
        interval = f"{difference['lo']:+.1%} .. {difference['hi']:+.1%}"
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['acc_05_a']:>8.1%}"
            f"{row['acc_05_b']:>8.1%}{difference['mean_diff']:>+8.1%}{interval:>18}"
            f"{test['b']:>8}{test['c']:>8}{test['p']:>11.3g}"
            f"{row['mean_iou']['mean_diff']:>+9.3f}"
        )
    return "\n".join(lines)
