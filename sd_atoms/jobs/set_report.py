"""From what finished runs on image sets left to their report."""

from collections.abc import Mapping, Sequence

from PIL import Image

from sd_atoms.data.records import ImageRecord
from sd_atoms.data.vtab import Task
from sd_atoms.errors import UserError
from sd_atoms.jobs.plan import PRETRAINED
from sd_atoms.jobs.results import collected
from sd_atoms.jobs.set_drawing import reference_of, set_requests, spread
from sd_atoms.jobs.sets import SetPlan
from sd_atoms.report.sets import ImageSet, SetComparison
from sd_atoms.sources import public_name


def set_comparison(plan: SetPlan, failed: Mapping[str, str]) -> SetComparison:
    """What a report is made of; raises UserError where finished runs cannot stand side by side."""
    entries = collected(plan)
    done = {entry["scores"]["concept"] for entry in entries}
    return SetComparison(
        base=public_name(plan.config(plan.runs[0]).base.pretrained_model_name_or_path),
        sets=tuple(_image_set(plan, name, tasks) for name, tasks in plan.sets.items() if name in done),
        methods=(PRETRAINED, *plan.methods),
        runs=tuple(entries),
        failed=dict(failed),
    )


def _image_set(plan: SetPlan, name: str, tasks: Sequence[Task]) -> ImageSet:
    task, count = tasks[0], plan.experiment.columns
    reference = reference_of(plan, next(run for run in plan.runs if run.concept == name))
    requests, labels = set_requests(task, plan.experiment, reference)
    if labels is None:
        real, shown = spread(reference, count), [request.name for request in requests[:count]]
        width = max(len(real), len(shown))
        real, shown = real + [None] * (width - len(real)), shown + [""] * (width - len(shown))
        columns, class_names = [f"sample {n}" for n in range(width)], ()
    else:
        chosen = spread(sorted(set(labels)), count)  # classes
        real = [next((image for image in reference if image.label == label), None) for label in chosen]
        shown = [requests[labels.index(label)].name for label in chosen]
        columns, class_names = [task.class_names[label] for label in chosen], task.class_names
    return ImageSet(
        name, [own.title for own in tasks], columns, [_opened(image) for image in real], shown, class_names
    )


def _opened(image: ImageRecord | None) -> Image.Image | None:
    """The picture; None where it cannot be read, which on_bad_image=skip allows."""
    try:
        return None if image is None else image.read()
    except UserError:
        return None
