"""From a network and a recipe to files in memory, in two steps: what prunes and trains, done once, and what
lowers and quantizes, which can be done again with other parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecnn.devices.capability import activation_dtype_for, weight_bits_for
from edgecnn.devices.kernels import kernels_for
from edgecnn.devices.profile import Device
from edgecnn.errors import EdgeCNNError, RecipeError
from edgecnn.export.dynamic import float_layers
from edgecnn.export.files import FileOptions, write_model
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Program
from edgecnn.images import Images, Sources, check_preprocess, choose_images, is_trained
from edgecnn.judgement import Made
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.options import CompressOptions
from edgecnn.pipeline import Need, Pass, PassContext, PassStages, Progress, run_passes
from edgecnn.preflight import refuse_quantized, suspect_channels
from edgecnn.quantize.float_layers import match_layers
from edgecnn.recipe import Recipe
from edgecnn.resume import Resumable

CHANGING = ("edgecnn.prune", "edgecnn.train", "edgecnn.distill")
"""Packages whose passes change what the network computes in float; the others only rewrite or quantize it."""


@dataclass(frozen=True)
class Plan:
    """How a network becomes files.

    Attributes:
        passes: the recipe's, fitted to the target, or others in their place.
        align: widen channels of the ONNX file to what ONNX Runtime's kernels on x86 work in.
    """

    passes: tuple[Pass, ...]
    align: bool = True


@dataclass(frozen=True)
class Prepared:
    """A network after the passes that prune and train.

    Attributes:
        loaded: as it was given, with the warnings about it.
        start: after the first `num_done` passes; the same as `loaded` where none prunes or trains.
        plan: what the recipe says for the target.
        num_done: how many of its passes are done.
        images: what the network is calibrated and judged on.
        context: what the remaining passes are given; its records are those of the passes done.
        float_program: of `loaded`.
    """

    loaded: Model
    start: Model
    plan: Plan
    num_done: int
    images: Images
    context: PassContext
    float_program: Program


@dataclass(frozen=True)
class Maker:
    """Makes the files of one run.

    Attributes:
        recipe, device, options: of the run.
        resumable: its checkpoints.
        progress: told how far the work is.
    """

    recipe: Recipe
    device: Device
    options: CompressOptions
    resumable: Resumable
    progress: Progress

    def prepare(self, model: Any, data: Any) -> Prepared:
        """Load the network and run the passes that prune and train.

        Args:
            model: as `edgecnn.compress` takes it.
            data: as `edgecnn.compress` takes it.
        """
        progress, options = self.progress, self.options
        progress.start("load and export the graph", None)
        loaded = load_model(model, options.load)
        progress.finish()
        refuse_quantized(loaded)
        passes = _fit_to_target(self.recipe.passes, self.device, options)
        sources = Sources(data, options.train_data)
        may_train = options.search and options.max_drop is not None
        images = choose_images(loaded, sources, passes, self.recipe.seed, progress, may_train=may_train)
        narrowed = _narrowed(self.recipe.passes, self.device)
        loaded = loaded.with_warning(
            *suspect_channels(loaded), *check_preprocess(loaded, images), *narrowed, *_unrecovered(passes)
        )
        context = self._context(loaded, images, passes)
        changing = [i for i, step in enumerate(passes) if type(step).__module__.startswith(CHANGING)]
        done = max(changing, default=-1) + 1
        if done:
            _find_named_layers(loaded, passes[done:], f"the recipe {self.recipe.name}")
        start = run_passes(loaded, passes, context, summarize, stop=done)
        float_program = build_program(FoldBatchNorm().run(loaded, context))
        return Prepared(loaded, start, Plan(tuple(passes)), done, images, context, float_program)

    def make(self, prepared: Prepared, plan: Plan) -> tuple[Made, list[dict[str, Any]]]:
        """Run the passes that lower and quantize, and write the files into memory.

        Args:
            prepared: of `prepare`.
            plan: the first `prepared.num_done` passes are taken as done.

        Returns:
            What was made, and the details of all passes for the report.
        """
        records = list(prepared.context.records)
        stages = prepared.context.checkpoints
        if stages is not None and plan.passes != prepared.plan.passes:  # trained otherwise, kept elsewhere
            digest = hashlib.sha256(repr(plan.passes).encode()).hexdigest()
            stages = PassStages(stages, f"search_{digest[:8]}")
        context = dataclasses.replace(prepared.context, records=records, checkpoints=stages)
        compressed = run_passes(prepared.start, plan.passes, context, summarize, start=prepared.num_done)
        self.progress.start("write the files", None)
        program = build_program(compressed)
        compressed = compressed.with_warning(*float_layers(program, self.options.formats))
        dtype = activation_dtype_for(self.device.isa)
        chosen = FileOptions(self.options.io, dtype, plan.align, self.device.max_opset)
        spec = prepared.loaded.spec
        files = {f: write_model(program, f, spec, chosen) for f in self.options.formats}
        compressed = compressed.with_warning(*too_large(plan.passes, {f: len(files[f].data) for f in files}))
        made = Made(
            loaded=prepared.loaded,
            compressed=compressed,
            trained=prepared.start if prepared.num_done else None,
            images=prepared.images,
            program=program,
            float_program=prepared.float_program,
            files=files,
            activation_dtype=dtype,
            device=self.device,
        )
        self.progress.finish()
        return made, records

    def _context(self, loaded: Model, images: Images, passes: Sequence[Pass]) -> PassContext:
        """Return what the passes are given."""
        teacher = self._teacher(loaded, passes)
        stages = self.resumable.open(loaded, images, passes, teacher)
        train = images.train
        return PassContext(
            images.dataset,
            images.split.calibration,
            self.recipe.seed,
            self.progress,
            train=train.dataset if train else None,
            train_indices=train.indices if train else (),
            validation_indices=train.validation if train else (),
            teacher=loaded if teacher is None else teacher,
            checkpoints=stages,
        )

    def _teacher(self, loaded: Model, passes: Sequence[Pass]) -> Model | None:
        """Return the network to learn from: another one, or the one that was given, as it was given."""
        options = self.options
        if not any(Need.TEACHER in step.needs for step in passes):
            if options.teacher is not None:
                raise RecipeError(
                    "a teacher is given, but no pass of the recipe learns from one",
                    hint="add --distill, or leave --teacher out",
                )
            return None
        if options.teacher is None:
            return loaded
        self.progress.start("load the teacher", None)
        _, *shape = loaded.spec.inputs[0].shape
        load = LoadOptions(
            arch=options.teacher_arch,
            input_shape=tuple(shape),  # type: ignore[arg-type]  # images, whose sizes are known
            trust=options.load.trust,
        )
        try:
            teacher = load_model(options.teacher, load)
        except EdgeCNNError as error:
            # Changed in place, so that the subclass and the traceback stay as they are.
            error.message = f"the teacher {options.teacher}: {error.message}"
            error.args = (error.message,)
            raise
        self.progress.finish()
        from edgecnn.distill.teacher import check_teacher

        check_teacher(loaded, teacher)  # said now, not after the pruning
        return teacher


def summarize(model: Model) -> dict[str, Any]:
    """Return the figures recorded before and after each pass."""
    tensors = {id(t): t for t in (*model.graph.parameters(), *model.graph.buffers())}.values()
    return {
        "nodes": len(model.graph.graph.nodes),
        "values": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def _fit_to_target(passes: Sequence[Pass], device: Device, options: CompressOptions) -> list[Pass]:
    """Return the passes with the calibration size asked for, weights that the target cannot saturate, and
    pruning that leaves widths which its kernels like.

    A file whose outputs are integers has one scale for each, whatever is joined in it.
    """
    fitted: list[Pass] = []
    for step in passes:
        changes: dict[str, Any] = {}
        names = {f.name for f in dataclasses.fields(step)}  # type: ignore[arg-type]
        if "weight_bits" in names:
            changes["weight_bits"] = min(step.weight_bits, _weight_bits(passes, device))  # type: ignore[attr-defined]
        if "num_samples" in names and options.num_samples is not None:
            changes["num_samples"] = options.num_samples
        if "kernel_width" in names:
            changes["kernel_width"] = kernels_for(device.isa).width
        if getattr(step, "bytes_per_weight", None) == 0:
            changes["bytes_per_weight"] = bytes_per_weight(passes)
        if "split_concats" in names and options.io != "float32":
            changes["split_concats"] = False
        fitted.append(dataclasses.replace(step, **changes) if changes else step)  # type: ignore[type-var]
    if not fitted:
        raise RecipeError("the recipe has no passes", hint="`edgecnn recipes list` names complete ones")
    return fitted


def _find_named_layers(loaded: Model, passes: Sequence[Pass], where: str) -> None:
    """Look for the layers that a recipe names before hours of training rather than after them.

    Args:
        loaded: as it was given; what prunes and trains renames no layer.
        passes: those behind.
        where: for the message.

    Raises:
        RecipeError: for a name that stands for nothing, with the nearest names.
    """
    for index, step in enumerate(passes):
        names: Sequence[str] = getattr(step, "float_layers", ())
        if not names:
            continue
        lowered = loaded
        for before in passes[:index]:
            lowered = before.run(lowered, PassContext())
        try:
            match_layers(lowered.graph, names)
        except RecipeError as error:
            raise RecipeError(f"{where} ({step.name}): {error.message}", hint=error.hint) from error


def bytes_per_weight(passes: Sequence[Pass]) -> float:
    """Return what a weight takes in the files that passes lead to: 1 for int8, 2 for float16, else 4."""
    if any(step.name.startswith("quantize") for step in passes):
        return 1.0
    stored = [getattr(step, "dtype", "") for step in passes if step.name == "store_weights"]
    return {"int8": 1.0, "float16": 2.0}.get(stored[-1] if stored else "", 4.0)


def too_large(passes: Sequence[Pass], num_bytes: Mapping[str, int]) -> list[str]:
    """Say which files, of so many bytes, are larger than pruning was to make them."""
    budget = min((mb for step in passes if (mb := getattr(step, "size_mb", None)) is not None), default=None)
    sizes = {name: count / 1e6 for name, count in num_bytes.items()}
    return [
        f"prune_channels was to leave a file of {budget:g} MB, and the {name} file has {size:.4g} MB: "
        f"ask for {budget * budget / size:.3g}"
        for name, size in sizes.items()
        if budget is not None and size > budget
    ]


def widens(passes: Sequence[Pass]) -> bool:
    """Whether activations become int16, which no int8 kernel computes or saturates."""
    return any(step.name == "widen_activations" for step in passes)


def _weight_bits(passes: Sequence[Pass], device: Device) -> int:
    """Return the bits of weights that the target's kernels do not saturate."""
    return 8 if widens(passes) else weight_bits_for(device.isa)


def _narrowed(passes: Sequence[Pass], device: Device) -> list[str]:
    """Say that weights are narrower than the recipe asks for, where the target makes them so."""
    bits = _weight_bits(passes, device)
    if all(getattr(step, "weight_bits", bits) <= bits for step in passes):
        return []
    why = f"{device.name} is {device.isa}, whose uint8 * int8 products saturate in pairs"
    return [f"{why}: weights have {bits} bits (a little less accuracy; ARM and x86 with VNNI take 8)"]


def _unrecovered(passes: Sequence[Pass]) -> list[str]:
    """Say that nothing wins the accuracy back that pruning costs, where nothing does."""
    pruned = [index for index, step in enumerate(passes) if step.name == "prune_channels"]
    if not pruned or any(is_trained(step) for step in passes[pruned[-1] :]):
        return []
    lost = "pruned without training: the accuracy that this costs is not won back"
    return [f"{lost}; give labelled images with --data, or --distill with unlabelled ones"]
