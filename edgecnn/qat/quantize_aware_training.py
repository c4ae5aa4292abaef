"""The pass `quantize_aware_training`: train the network with the rounding that its files will do.

    calibrate as quantize_static does -> train on fake-quantized weights, biases and activations -> fix the
    step sizes where nothing ties -> train the rest to them -> write the integers as quantize_static does

The result has the form that quantize_static leaves. Its teacher is the network as it was loaded, so it learns
to answer as it did before it was rounded, with labels or without; the loop and its checkpoints are those of
fine-tuning, the loss that of distillation. Batch norms are folded already: their scale and shift are trained
as part of weights and biases.

Source: Esser et al. 2020, arXiv:1902.08153 (lsq); Jacob et al. 2018, arXiv:1712.05877, section 3
(fake_quant).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import fx

from edgecnn.data.memory import MemoryImages
from edgecnn.distill.distill import Distill
from edgecnn.errors import PassError
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext, PassStages
from edgecnn.qat.network import FakeQuantized, Scales, make_fake_quantized
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.train.settings import Precision, TrainSettings

Method = Literal["lsq", "fake_quant"]

SETTLING_RATE = 0.25
"""Learning rate with fixed step sizes, as a share of the one before."""


@dataclass(frozen=True)
class QuantizeAwareTraining(TrainSettings):
    """Pass: static int8 whose weights, biases and step sizes were trained with the rounding.

    Source: Esser et al. 2020, arXiv:1902.08153 (lsq); Jacob et al. 2018, arXiv:1712.05877 (fake_quant);
    Hinton et al. 2015, arXiv:1503.02531 (self-distillation).

    Attributes:
        method: "lsq" trains the step sizes too, of weights per output channel and of activations;
            "fake_quant" leaves the ranges as they were calibrated. Zero points stay in both.
        observer: how activation ranges are chosen to start from: min_max, moving_average, percentile, mse or
            entropy.
        weight_observer: "min_max" or "mse", per output channel, to start from.
        weight_bits: 8, or 7 for x86 without VNNI. From Python 2 and more can be simulated: the files then
            hold narrower values in int8.
        num_samples: calibration images at most.
        alpha: share of the teacher in the loss, above 0, at most 1; the labels have the rest. Where there are
            none it is 1.
        settle: share of the epochs, the last ones, in which step sizes are fixed and the rest is trained to
            them, at a quarter of the rate; the files then compute what was trained. Of "lsq"; 0 for none.
        float_layers: names or patterns of layers that compute in float, as in `QuantizeStatic`; there they
            are trained in float too, and rounded on the way into int8 alone.
        split_concats: give concatenated values scales of their own where they differ much.
        unsupported: "float" leaves operators without an int8 form in float, "error" refuses them.
        temperature: of the teacher's answers.
        hard_labels: False leaves labels out even where there are some.
        precision: "float32", which "auto" means here too; in bfloat16 half of the levels of int8 fall
            together.
        The others are those of `edgecnn.train.settings.TrainSettings`.
    """

    __doc__ = (__doc__ or "") + (TrainSettings.__doc__ or "").partition("Attributes:\n")[2]

    epochs: float = 2.0
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    batch_size: int = 64
    ema_decay: float | None = 0.99
    clip_norm: float | None = 10.0
    precision: Precision = "float32"
    method: Method = "lsq"
    observer: str = "mse"
    weight_observer: str = "min_max"
    weight_bits: int = 8
    num_samples: int = 512
    settle: float = 0.2
    alpha: float = 0.5
    temperature: float = 4.0
    hard_labels: bool = True
    float_layers: tuple[str, ...] = ()
    split_concats: bool = True
    unsupported: str = "float"

    name: ClassVar[str] = "quantize_aware_training"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION, Need.TRAIN_IMAGES, Need.TEACHER})

    def check(self) -> None:
        """Check the parameters.

        Raises:
            PassError: naming the parameter, what was found and what was expected.
        """
        super().check()
        if self.method not in get_args(Method):
            raise PassError(f"method is {self.method!r}, expected one of {', '.join(get_args(Method))}")
        if self.precision not in ("auto", "float32"):
            raise PassError(
                f"precision is {self.precision}, expected float32",
                hint="8 bits of mantissa do not tell the levels of int8 apart",
            )
        if not 0.0 <= self.settle < 1.0:
            raise PassError(f"settle is {self.settle}, expected 0 <= settle < 1")
        self._static().check()
        self._distillation(1.0).check()

    def requires(self, model: Model) -> None:
        """Refuse a graph that is quantized already, still has batch norms, or lacks a layer that is named."""
        self._static().requires(model)

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the model with quantize/dequantize nodes and trained integers."""
        return self.written(*self.trained(model, context), context)

    def trained(self, model: Model, context: PassContext) -> tuple[FakeQuantized, Model]:
        """Return the network that was trained, as it was made and as it became: still in float.

        Raises:
            PassError: if something is missing to train with, or the loss is not finite.
            DataError: if the images cannot train this network.
        """
        step, learns = self._static(), self.method == "lsq"
        calibrated = step.calibrated(model, context)
        if context.train is not None:
            context = replace(context, train=MemoryImages(context.train, model.spec.preprocess))
        made = make_fake_quantized(calibrated, step, learn_scales=learns)
        share = 1.0 - self.settle if learns else 1.0
        trained = self._distillation(share).run(made.model, context)
        if share == 1.0:
            return made, trained
        scales = self._read_back(made, trained, context)
        made = make_fake_quantized(calibrated, step, learn_scales=False, scales=scales)
        if context.checkpoints is not None:
            context = replace(context, checkpoints=PassStages(context.checkpoints, "settle"))
        last = self._distillation(self.settle)
        rest = replace(last, learning_rate=SETTLING_RATE * self.learning_rate).run(made.model, context)
        return made, rest.with_warning(*(text for text in trained.warnings if text not in rest.warnings))

    def written(self, made: FakeQuantized, trained: Model, context: PassContext) -> Model:
        """Return the integers of a network that was trained; `made` is used up."""
        scales = self._read_back(made, trained, context)
        graph = self._static().write(made.calibrated, scales)
        return trained.with_graph(graph).with_warning(*made.calibrated.warnings)

    def _read_back(self, made: FakeQuantized, trained: Model, context: PassContext) -> Scales:
        """Return the scales of the weights; where they were learned, record how far step sizes moved."""
        started = dict(made.calibrated.by_root)
        scales = made.read_back(trained.graph)
        if made.learns_scales or self.method == "fake_quant":
            context.records.append(self._describe(made, trained, started))
        return scales

    def ensures(self, before: Model, after: Model) -> None:
        """Check that every layer reads integer weights, and that their scales are finite."""
        self._static().ensures(before, after)
        for name, tensor in after.graph.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PassError(f"{name} holds NaN or infinity after {self.name}")

    def _static(self) -> _Static:
        """Return the pass that calibrates and writes; training takes the place of bias correction."""
        return _Static(
            observer=self.observer,
            weight_observer=self.weight_observer,
            weight_bits=self.weight_bits,
            num_samples=self.num_samples,
            bias_correction=False,
            float_layers=self.float_layers,
            split_concats=self.split_concats,
            unsupported=self.unsupported,
        )

    def _distillation(self, share: float) -> _SelfDistillation:
        """Return the pass that trains for a share of the epochs."""
        own = {field.name: getattr(self, field.name) for field in fields(TrainSettings)}
        own |= {"precision": "float32", "epochs": share * self.epochs}
        if self.max_steps is not None:
            own["max_steps"] = max(round(share * self.max_steps), 1)
        return _SelfDistillation(
            **own, alpha=self.alpha, temperature=self.temperature, hard_labels=self.hard_labels
        )

    def _describe(
        self, made: FakeQuantized, trained: Model, started: dict[fx.Node, tuple[float, int]]
    ) -> dict[str, Any]:
        """Return what the report says: how far the step sizes of activations moved, and to avoid ties."""
        tensors = trained.graph.state_dict()
        learned = {root: float(tensors[name]) for root, name in made.slot_scales.items()}
        by_root = made.calibrated.by_root
        moved = [abs(learned[root] / scale - 1.0) for root, (scale, _) in started.items()]
        unbound = [abs(by_root[root][0] / scale - 1.0) for root, scale in learned.items()]
        return {
            "pass": self.name,
            "kind": "quantize_aware_training",
            "method": self.method,
            "weight_bits": self.weight_bits,
            "layers": len(made.weight_scales),
            "activation_scales": len(learned),
            "largest_scale_change": max(moved, default=0.0),
            "largest_change_against_ties": max(unbound, default=0.0),
        }


@dataclass(frozen=True)
class _SelfDistillation(Distill):
    """Distillation under the name of the pass that it works for."""

    name: ClassVar[str] = QuantizeAwareTraining.name


@dataclass(frozen=True)
class _Static(QuantizeStatic):
    """Static quantization under the name of the pass that it works for."""

    name: ClassVar[str] = QuantizeAwareTraining.name
