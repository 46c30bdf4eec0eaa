"""The operators of fused models on the CPU, against their specification (design section 6)."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shvit_kernels.backends import fused
from shvit_kernels.ops import Kind, flatten, pack, taps_of_winograd, unpack, winograd
from tests.support import native as native_tier
from tests.support.numerics import (
    Call,
    Expected,
    assert_parity,
    assert_same_non_finite,
    distance,
    largest,
    unit_roundoff,
)

pytestmark = native_tier.needs_native


def packed(weight: Tensor) -> Tensor:
    """``[outputs, inputs]``, or a kernel ``[outputs, C, 3, 3]`` as Winograd's products."""
    return pack(winograd(weight).flatten(1) if weight.dim() == 4 else weight)


@dataclass(frozen=True)
class Operation:
    """An operator on inputs of some size; the inputs that are weights to be packed, and its settings."""

    name: str
    x: tuple[int, int, int, int]
    weights: dict[str, tuple[int, ...]]
    packed: tuple[str, ...] = ()
    settings: tuple = ()

    @property
    def by_winograd(self) -> bool:
        return any(len(shape) == 4 for shape in self.weights.values())

    def arguments(self, tensors: dict[str, Tensor]) -> list:
        """What the operator takes after x."""
        given = [packed(t) if name in self.packed else t for name, t in tensors.items() if name != "x"]
        if self.name == "sequence":
            return [[flatten(given)], *self.settings]
        if self.name == "pointwise" and "scale" not in tensors:
            given.insert(0, None)
        return [*given, *self.settings]

    def call(self, layout: str = "channels_last", dtype: torch.dtype = torch.float32) -> Call:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tensors = {"x": draw(*self.x)}
        if layout == "channels_last":
            tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
        for name, shape in self.weights.items():
            tensors[name] = draw(*shape) * math.prod(shape[1:]) ** -0.5

        def function(backend: str, x: Tensor, **rest) -> dict[str, Tensor]:
            operators = fused.SPECIFICATION if backend == "eager" else fused.NATIVE
            return {"y": getattr(operators, self.name)(x, *self.arguments(rest))}

        return Call(function, {name: t.to(dtype) for name, t in tensors.items()}, {})


def conv3x3(B, C, H, W, outputs, relu=True, winograd=False):
    weights = {"weight": (outputs, C, 3, 3) if winograd else (outputs, 9 * C), "bias": (outputs,)}
    return Operation("conv3x3", (B, C, H, W), weights, ("weight",), (relu, winograd))


def depthwise(B, C, H, W, stride, relu=False):
    return Operation("depthwise", (B, C, H, W), {"weight": (9, C), "bias": (C,)}, (), (stride, relu))


def pointwise(B, C, H, W, outputs, relu=False, scale=True):
    weights = {"scale": (B, C)} if scale else {}
    weights |= {"weight": (outputs, C), "bias": (outputs,)}
    return Operation("pointwise", (B, C, H, W), weights, ("weight",), (relu,))


def ffn(B, C, H, W, hidden):
    weights = {"weight1": (hidden, C), "bias1": (hidden,), "weight2": (C, hidden), "bias2": (C,)}
    return Operation("ffn", (B, C, H, W), weights, ("weight1", "weight2"))


def mixer(B, C, H, W, P, D=16):
    O = 2 * D + P
    weights = {"norm_weight": (P,), "norm_bias": (P,), "qkv_weight": (O, P), "qkv_bias": (O,)}
    weights |= {"weight": (C, C), "bias": (C,)}
    return Operation("mixer", (B, C, H, W), weights, ("weight",), (D, 1e-5, D**-0.5))


def pool(B, C, H, W):
    return Operation("pool", (B, C, H, W), {})


def patch_merging(C, outputs, squeezed) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    wide = 4 * C
    sizes = {"conv1": (wide, C), "conv2": (9, wide), "fc1": (squeezed, wide), "fc2": (wide, squeezed)}
    sizes["conv3"] = (outputs, wide)
    weights = {}
    for name, size in sizes.items():
        weights |= {f"{name}_weight": size, f"{name}_bias": (wide if name == "conv2" else size[0],)}
    return weights, tuple(f"{name}_weight" for name in sizes if name != "conv2")


def sequence(B, C, H, W, width=24, P=10, D=3):
    """Every kind of layer, after a stem and before a depthwise convolution of stride 2."""
    O = 2 * D + P
    weights, merging_packed = patch_merging(width, 37, 24)
    weights = {
        **{"stem": (width, 9 * C), "stem_bias": (width,)},
        **{"taps": (9, width), "taps_bias": (width,)},
        **{"norm": (P,), "norm_bias": (P,), "qkv": (O, P), "qkv_bias": (O,), "proj": (width, width), "pb": (width,)},
        **{"weight1": (50, width), "bias1": (50,), "weight2": (width, 50), "bias2": (width,)},
        **weights,
        **{"last": (9, 37), "last_bias": (37,)},
    }
    packed = ("stem", "proj", "weight1", "weight2", *merging_packed)
    layers = [
        *(Kind.CONV3X3, C, width, 1, 0),
        *(Kind.DEPTHWISE, width, 1, 0, 0),
        *(Kind.MIXER, width, D, P, 0),
        *(Kind.FFN, width, 50, 0, 0),
        *(Kind.PATCH_MERGING, width, 37, 4 * width, 24),
        *(Kind.DEPTHWISE, 37, 2, 1, 0),
    ]
    return Operation("sequence", (B, C, H, W), weights, packed, (layers, [1e-5, D**-0.5]))


def merging(B, C, H, W, outputs, squeezed, relu=0):
    """Patch merging and the head of a model."""
    weights, packed = patch_merging(C, outputs, squeezed)
    weights |= {"head": (11, outputs), "head_bias": (11,)}
    layers = [Kind.PATCH_MERGING, C, outputs, 4 * C, squeezed, Kind.POOL, 0, 0, 0, 0]
    layers += [Kind.POINTWISE, outputs, 11, relu, 0]
    return Operation("sequence", (B, C, H, W), weights, (*packed, "head"), (layers, []))


def stem(B, C, H, W, *widths, relus=(1, 1, 1), squares=(0, 0, 0)):
    """Convolutions of stride 2, the first two of which are one step unless the first is made in squares."""
    weights, layers, inputs = {}, [], C
    for i, width in enumerate(widths):
        layers += [Kind.CONV3X3, inputs, width, relus[i], squares[i]]
        weights |= {f"conv{i}": (width, inputs, 3, 3) if squares[i] else (width, 9 * inputs), f"bias{i}": (width,)}
        inputs = width
    packed = tuple(name for name in weights if name.startswith("conv"))
    return Operation("sequence", (B, C, H, W), weights, packed, (layers, []))


# The published sizes, few images and many.
PUBLISHED = [
    conv3x3(1, 3, 64, 64, 28),
    conv3x3(2, 28, 32, 32, 56),
    conv3x3(2, 112, 16, 16, 224, relu=False),
    conv3x3(2, 28, 32, 32, 56, winograd=True),
    conv3x3(1, 112, 32, 32, 224, relu=False, winograd=True),
    conv3x3(1, 64, 28, 28, 128, winograd=True),
    depthwise(2, 224, 16, 16, 1),
    depthwise(2, 1344, 8, 8, 2, relu=True),
    pointwise(2, 336, 8, 8, 1344, relu=True),
    pointwise(5, 1232, 7, 7, 448),
    ffn(1, 448, 4, 4, 896),
    ffn(3, 308, 7, 7, 616),
    ffn(2, 128, 14, 14, 256),
    mixer(1, 336, 8, 8, 72),
    mixer(5, 352, 7, 7, 75),
    mixer(17, 448, 4, 4, 96),
    pool(3, 448, 4, 4),
    sequence(3, 3, 32, 32),
]
# Every edge: one pixel, odd sides, ragged channels, more tokens than a block has, rows in more than one band.
EDGES = [
    *[
        conv3x3(2, C, H, W, outputs, winograd=squares)
        for C, H, W, outputs in ((1, 1, 1, 1), (3, 5, 9, 17), (5, 2, 300, 40), (2, 37, 3, 16))
        for squares in (False, True)
    ],
    *[
        conv3x3(2, 19, *size, 50, winograd=True)
        for size in ((2, 1), (1, 2), (3, 4), (4, 3), (6, 7), (8, 5), (7, 6), (16, 18))
    ],
    *[
        depthwise(2, C, H, W, stride)
        for stride in (1, 2)
        for C, H, W in ((1, 1, 1), (3, 1, 2), (4, 2, 1), (19, 5, 6), (40, 9, 9), (64, 40, 50))
    ],
    *[pointwise(*size) for size in ((1, 1, 1, 1, 1), (2, 7, 3, 5, 33), (3, 17, 9, 9, 1000))],
    pointwise(70, 30, 1, 1, 50, scale=False),
    pointwise(2, 30, 6, 6, 50, relu=True, scale=False),
    *[ffn(*size) for size in ((1, 1, 1, 1, 1), (2, 5, 6, 7, 9), (2, 33, 25, 42, 129))],
    *[mixer(*size) for size in ((1, 2, 1, 1, 1, 1), (3, 20, 3, 3, 7, 3), (2, 40, 13, 20, 32), (2, 33, 25, 42, 17, 8))],
    pool(2, 5, 25, 42),
    *[merging(*size) for size in ((1, 12, 7, 9, 21, 5), (3, 40, 31, 60, 50, 24), (5, 9, 2, 1, 3, 2))],
    *[
        stem(*size, squares=squares)
        for size in ((2, 3, 61, 90, 20, 37), (1, 3, 40, 33, 8, 16, 24), (3, 5, 3, 1, 4, 9))
        for squares in ((0, 0, 0), (0, 1, 1), (1, 0, 1))
    ],
]
OTHERS = [
    conv3x3(0, 3, 8, 8, 5),
    depthwise(0, 5, 4, 4, 1),
    pointwise(0, 5, 4, 4, 7),
    ffn(0, 5, 4, 4, 7),
    mixer(0, 9, 4, 4, 5, 2),
    pool(0, 5, 4, 4),
    merging(0, 9, 4, 4, 3, 2),
    merging(2, 9, 4, 4, 3, 2, relu=1),
    stem(0, 3, 8, 8, 4, 9),
    *[stem(2, 3, 9, 8, 4, 9, relus=relus) for relus in ((1, 0), (0, 1), (0, 0))],
    sequence(70, 3, 8, 8),  # several chunks of images
    sequence(2, 2, 90, 70),
    sequence(2, 5, 1, 1),
    sequence(0, 3, 8, 8),
]
OPERATIONS = [*PUBLISHED, *EDGES, *OTHERS]
SMALL = [
    conv3x3(2, 3, 9, 8, 21),
    conv3x3(2, 3, 9, 8, 21, winograd=True),
    depthwise(2, 21, 5, 4, 2),
    pointwise(2, 9, 3, 3, 21),
    ffn(2, 9, 3, 3, 21),
]
SMALL += [mixer(3, 21, 3, 3, 9, 3), pool(2, 21, 3, 3)]
SMALL += [merging(2, 12, 31, 60, 21, 20), stem(2, 3, 37, 50, 9, 21)]
SMALL += [stem(2, 3, 37, 50, 9, 21, squares=(0, 1)), sequence(2, 3, 9, 8)]


def named(operations):
    return [pytest.param(o, id=f"{o.name}-{'x'.join(map(str, o.x))}-{i}") for i, o in enumerate(operations)]


each_small = pytest.mark.parametrize("operation", named(SMALL))


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EACH_KERNEL = [
    pytest.param(*kernel.values, dtype, marks=kernel.marks, id=f"{kernel.values[0]}-{dtype}")
    for dtype, variants in (
        (torch.float32, native_tier.PROJECTION_VARIANTS),
        (torch.bfloat16, native_tier.FUSED_BFLOAT16_VARIANTS),
    )
    for kernel in native_tier.each_variant(variants)
]


def expect(call: Call) -> dict[str, Expected]:
    """The output alone, within the bound of design section 6."""
    dtype = call.inputs["x"].dtype
    truth, plain = (c.run("eager", ())["y"] for c in (call.to(torch.float64), call.to(dtype)))
    bound = 2 * distance(plain, truth) + 8 * unit_roundoff(dtype) * largest(truth)
    return {"y": Expected(truth, bound, dtype)}


def native(operation: Operation, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> Tensor:
    call = operation.call(dtype=dtype)
    return call.function(**{**call.inputs, **tensors}, backend="cpu")["y"]


@each_dtype
@pytest.mark.parametrize("operation", named(OPERATIONS))
def test_parity(operation, dtype):
    call = operation.call(dtype=dtype)
    assert_parity(call.run("cpu", ()), expect(call))


@pytest.mark.parametrize("variant, dtype", EACH_KERNEL)
@pytest.mark.parametrize("operation", named([*SMALL, *EDGES]))
def test_parity_of_every_instruction_set(operation, variant, dtype):
    call = operation.call(dtype=dtype)
    with native_tier.instruction_set(variant):
        assert_parity(call.run("cpu", ()), expect(call))


@each_small
def test_layout_of_the_input_does_not_matter(operation):
    rows, planes = operation.call(), operation.call("nchw")
    y = rows.run("cpu", ())["y"]
    torch.testing.assert_close(planes.run("cpu", ())["y"], y, rtol=1e-6, atol=1e-6)
    assert y.dim() == 2 or y.is_contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([rows.inputs["x"]] * 2, 3)[..., : operation.x[3]]
    assert torch.equal(native(operation, x=sliced), y) or operation.name in ("conv3x3", "sequence")


@each_dtype
@pytest.mark.parametrize("operation", named([*SMALL, *PUBLISHED]))
def test_same_bits_for_any_number_of_threads(operation, dtype):
    call = operation.call(dtype=dtype)
    runs = []
    for count in (1, 2, 3):
        with native_tier.threads(count):
            runs.append(call.run("cpu", ())["y"])
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_small
@each_dtype
def test_non_finite_values_stay_in_their_image(operation, dtype, value):
    call = operation.call(dtype=dtype)
    x = call.inputs["x"].clone()
    x[1, 0, 1, 1] = value
    poisoned, clean = native(operation, dtype, x=x), native(operation, dtype)
    assert torch.equal(poisoned[0], clean[0])
    assert not poisoned[1].isfinite().all()
    # In float32: PyTorch's convolutions in bfloat16 let NaN into the pixels beside it.
    with_poison = Call(call.function, {**call.inputs, "x": x}, {}).to(torch.float32)
    specified = with_poison.run("eager", ())["y"]
    if value == float("inf") and operation.by_winograd:
        # NaN where the specification has an infinity, or zero because ReLU follows, but nowhere else.
        x[1, 0, 1, 1] = float("nan")
        reached = native(operation, dtype, x=x).isnan()
        assert not (poisoned.isfinite() & ~specified.isfinite()).any()
        assert not (~poisoned.isfinite() & ~reached).any()
    else:
        assert_same_non_finite(poisoned.float(), specified)


@each_small
@each_dtype
def test_opcheck(operation, dtype):
    call = operation.call(dtype=dtype)
    operator = getattr(torch.ops.shvit_kernels, f"fused_{operation.name}").default
    torch.library.opcheck(operator, (call.inputs["x"], *operation.arguments(call.inputs)))


@each_small
def test_weights_of_another_size_are_refused(operation):
    call = operation.call()
    for name, tensor in call.inputs.items():
        if name == "x":
            continue
        wrong = torch.cat([tensor, tensor])
        with pytest.raises(RuntimeError, match=r"must have|must be packed|must lie|tensors have|channels at"):
            native(operation, **{name: wrong})


@each_small
def test_other_types_are_refused(operation):
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16, got float64"):
        native(operation, x=operation.call().inputs["x"].double())


@each_small
@each_dtype
def test_weights_of_another_type_are_refused(operation, dtype):
    call = operation.call(dtype=dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    if operation.name == "sequence":  # whose weights are one tensor
        with pytest.raises(RuntimeError, match=f"weights must be {str(other)[6:]} as x is, got {str(dtype)[6:]}"):
            native(operation, dtype, x=call.inputs["x"].to(other))
        return
    for name, tensor in call.inputs.items():
        if name != "x":
            with pytest.raises(RuntimeError, match=f"must be {str(dtype)[6:]} as x is, got {str(other)[6:]}"):
                native(operation, dtype, **{name: tensor.to(other)})


@pytest.mark.parametrize("operators", [fused.NATIVE, fused.SPECIFICATION], ids=["native", "specification"])
def test_sequences_that_do_not_add_up_are_refused(operators):
    call = SMALL[-1].call()
    x = call.inputs["x"]
    (weights,), layers, constants = SMALL[-1].arguments(call.inputs)
    for given, message in (
        (([], layers, constants), "take more weights than the 0 tensors have"),
        (([weights, weights[:16]], layers, constants), "take fewer weights than the 2 tensors have"),
        (([weights], [*layers[:5], Kind.DEPTHWISE, 23, *layers[7:]], constants), "must have 23 channels at .*, got 24"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.sequence(x, *given)
    with pytest.raises((RuntimeError, ValueError), match=r"x must have 3 channels at .*, got 1"):
        operators.sequence(x[:, :1], [weights], layers, constants)


def test_more_that_the_compiled_sequence_refuses():
    call = SMALL[-1].call()
    (weights,), layers, constants = SMALL[-1].arguments(call.inputs)
    for given, message in (
        (([weights[:-1]], layers, constants), "take more weights than the 1 tensors have"),
        (([weights], layers[:-1], constants), "5 integers each, got 29"),
        (([weights], [], constants), "5 integers each, got 0"),
        (([weights], layers, constants[:1]), "take more than 1 constants"),
        (([weights], [9, *layers[1:]], constants), "no layer of kind 9"),
        (([weights], [*layers[:2], 2**60, *layers[3:]], constants), r"between 1 and 2\^24, got 1152921504606846976"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.shvit_kernels.fused_sequence(call.inputs["x"], *given)
    with pytest.raises(RuntimeError, match=r"between 1 and 2\^24"):
        torch.ops.shvit_kernels.fused_sequence(torch.empty(0, 2**60, 1, 1), [weights], [3, 2**60, *layers[2:5]], [])


BAD_LAYERS = {
    "more_partial_channels_than_there_are": ((Kind.MIXER, 24, 3, 40, 0), "pdim must lie between 1 and 24, got 40"),
    "no_partial_channels": ((Kind.MIXER, 24, 3, 0, 0), r"between 1 and 2\^24, got 0"),
    "wide_queries": ((Kind.MIXER, 24, 2**60, 10, 0), r"between 1 and 2\^24, got 1152921504606846976"),
    "stride": ((Kind.DEPTHWISE, 24, 3, 0, 0), "stride must be 1 or 2, got 3"),
}


@pytest.mark.parametrize("layer, message", BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_layers_that_the_compiled_sequence_refuses(layer, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.shvit_kernels.fused_sequence(torch.randn(1, 24, 4, 4), [torch.zeros(10000)], list(layer), [1e-5, 1.0])


@pytest.mark.parametrize("operation, doubled", [(ffn(2, 9, 3, 3, 21), "2"), (mixer(3, 9, 3, 3, 5, 2), "")])
def test_other_outputs_than_channels_are_refused(operation, doubled):
    inputs = operation.call().inputs
    wrong = {name: torch.cat([inputs[name]] * 2) for name in (f"weight{doubled}", f"bias{doubled}")}
    with pytest.raises(RuntimeError, match=f"weight{doubled} must have 9 outputs, got 18"):
        native(operation, **wrong)


def test_images_without_pixels_are_refused_by_the_bare_operators():
    with pytest.raises(RuntimeError, match="x must have a channel and a pixel"):
        torch.ops.shvit_kernels.fused_pool(torch.randn(2, 5, 0, 3))


def test_the_weights_of_a_sequence_may_be_several_tensors():
    call = SMALL[-1].call()
    (weights,), layers, constants = SMALL[-1].arguments(call.inputs)
    stem = (27 + 1) * 32 + 32
    given = [weights[:stem], weights[stem:]], layers, constants
    for operators in (fused.NATIVE, fused.SPECIFICATION):
        expected = operators.sequence(call.inputs["x"], [weights], layers, constants)
        assert torch.equal(operators.sequence(call.inputs["x"], *given), expected)


@pytest.mark.parametrize("operators", [fused.NATIVE, fused.SPECIFICATION], ids=["native", "specification"])
def test_rows_are_images_of_one_pixel(operators):
    head = pointwise(7, 21, 1, 1, 11, scale=False).call()
    weights = flatten((pack(head.inputs["weight"]), head.inputs["bias"]))
    x = head.inputs["x"]
    rows = torch.cat([x.flatten(1)] * 2, 1)[:, : x.shape[1]]
    y = operators.sequence(rows, [weights], [Kind.POINTWISE, 21, 11, 0, 0], [])
    assert y.shape == (7, 11) and not rows.is_contiguous()
    torch.testing.assert_close(y, F.linear(rows, head.inputs["weight"], head.inputs["bias"]))


def test_strided_images_are_refused_by_the_bare_operators():
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)[:, ::2]
    with pytest.raises(RuntimeError, match="x must be channels_last"):
        torch.ops.shvit_kernels.fused_pool(x)


def test_a_branch_of_zeros_adds_its_bias():
    """As at initialisation, where the last batch normalisation of a branch is 0."""
    operation = ffn(9, 48, 5, 5, 96)
    inputs = operation.call().inputs
    y = native(operation, weight2=torch.zeros_like(inputs["weight2"]))
    assert torch.equal(y, inputs["x"] + inputs["bias2"][:, None, None])


def test_winograd_keeps_the_kernel():
    kernel = torch.randn(5, 7, 3, 3)
    products = winograd(kernel)
    assert products.shape == (5, 25, 7)
    assert torch.equal(taps_of_winograd(products), kernel.flatten(2).transpose(1, 2))
    assert torch.equal(winograd(kernel.double()).float(), products)  # sums are rounded once


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 48])
def test_packing_is_undone(outputs):
    weight = torch.randn(outputs, 7)
    packed = pack(weight)
    assert packed.shape == (-(-outputs // 16), 7 + 1, 16)
    assert torch.equal(unpack(packed, outputs), weight)
    assert packed[0, 3, 0] * packed[0, 7, 0] == weight[0, 3]
    assert not packed[-1, :, outputs % 16 or 16 :].any()


@each_small
def test_gradients_go_through_the_specification(operation):
    x, weight = operation.call().inputs["x"], torch.ones(1)
    assert fused.operators(x, [weight]) is fused.NATIVE
    assert fused.operators(x.double(), [weight]) is fused.SPECIFICATION
    for tensor in (x, weight):
        tensor.requires_grad_()
        assert fused.operators(x, [weight]) is fused.SPECIFICATION
        with torch.no_grad():
            assert fused.operators(x, [weight]) is fused.NATIVE
        tensor.requires_grad_(False)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert fused.operators(x, [weight]) is fused.SPECIFICATION
    called = []
    torch.func.vmap(lambda one: called.append(fused.operators(one, [weight])) or one)(x)
    assert called == [fused.SPECIFICATION]
