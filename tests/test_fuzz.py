"""Random shapes, strides and types through every operator of the CPU, in a bounded number of draws."""

import random
from dataclasses import replace

import pytest
import torch

from tests import test_fused_operators as fused_operators
from tests.support import native as native_tier
from tests.support.cases import BATCH_NORMS, Case, mixer_eval_call, shsa_call
from tests.support.numerics import assert_parity, expect

pytestmark = native_tier.needs_native

DRAWS = 40


def small(draw: random.Random, most: int) -> int:
    """Mostly small numbers, and now and then one as large as may be."""
    return draw.randint(1, draw.choice([3, 17, most]))


def shsa(draw: random.Random) -> Case:
    return Case(
        P=small(draw, 90),
        D=small(draw, 40),
        N=small(draw, 300),
        B=draw.randint(0, 4),
        beyond=draw.choice([0, 1, 30]),
        dtype=draw.choice([torch.float32, torch.float64, torch.bfloat16]),
        layout=draw.choice(["nchw", "channels_last"]),
        relu=draw.random() < 0.5,
        bias=draw.random() < 0.5,
        norm=draw.choice(["affine", "weight", "none"]),
    )


def fused(draw: random.Random) -> fused_operators.Operation:
    f = fused_operators
    B, C, H, W = draw.randint(0, 5), small(draw, 70), small(draw, 30), small(draw, 30)
    other = small(draw, 140)
    return draw.choice(
        [
            lambda: f.conv3x3(B, C, H, W, other, relu=draw.random() < 0.5, winograd=draw.random() < 0.5),
            lambda: f.depthwise(B, C, H, W, draw.choice([1, 2]), relu=draw.random() < 0.5),
            lambda: f.pointwise(B, C, H, W, other, relu=draw.random() < 0.5, scale=draw.random() < 0.5),
            lambda: f.ffn(B, C, H, W, other),
            lambda: f.mixer(B, C, H, W, draw.randint(1, C), small(draw, 24)),
            lambda: f.pool(B, C, H, W),
            lambda: f.sequence(B, small(draw, 5), H * 3, W * 3, draw.randint(12, 40)),
        ]
    )()


@pytest.mark.parametrize("seed", range(DRAWS))
def test_shsa(seed):
    draw = random.Random(seed)
    call = shsa_call(shsa(draw))
    with native_tier.instruction_set(draw.choice(native_tier.runnable_variants())):
        assert_parity(call.run("cpu"), expect(call))


@pytest.mark.parametrize("seed", range(DRAWS))
def test_mixer_eval(seed):
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32, torch.float64])
    norms = [draw.choice(BATCH_NORMS) for _ in range(2)]
    call = mixer_eval_call(replace(shsa(draw), dtype=dtype), *norms, residual=draw.random() < 0.5)
    with native_tier.instruction_set(draw.choice(native_tier.runnable_variants())):
        assert_parity(call.run("cpu", ()), expect(call))


@pytest.mark.parametrize("seed", range(3 * DRAWS))
def test_fused(seed):
    draw = random.Random(seed)
    operation = fused(draw)
    call = operation.call(draw.choice(["nchw", "channels_last"]), draw.choice([torch.float32, torch.bfloat16]))
    if draw.random() < 0.3 and operation.x[3] > 1:  # strided images are copied first
        call = call.map(lambda name, t: t[..., ::2] if name == "x" else t)
    with native_tier.instruction_set(draw.choice(native_tier.runnable_variants())):
        assert_parity(call.run("cpu", ()), fused_operators.expect(call))
