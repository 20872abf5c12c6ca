"""The extension's CUDA kernels. Without a GPU: what is compiled, registered, refused. With one: results and gradients.

`python tests/build_variant.py emulated` runs the kernels' code itself on a CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_layer_norm
import test_linear
import test_patch_embed
import torch
from hardware import GPU
from torch._subclasses.fake_tensor import FakeTensorMode

import vit_fast
from vit_fast import backends, extension
from vit_fast.testing import randn, with_gradients

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import cuda_resources  # noqa: E402

MISSING = extension.missing("cuda")
if MISSING is not None and torch.version.cuda is not None and os.environ.get("VIT_FAST_EXT") == "cuda":
    pytest.fail(f"the extension for CUDA was asked for: {MISSING}", pytrace=False)
loaded = pytest.mark.skipif(MISSING is not None, reason=f"no CUDA kernels: {MISSING}")
on_gpu = pytest.mark.skipif(MISSING is not None or not GPU, reason=f"no CUDA kernels: {MISSING}" if MISSING else "needs a GPU")
ops = torch.ops.vit_fast_cpp

# ---- What is compiled -----------------------------------------------------------------------------------------------

needs_object = pytest.mark.skipif(
    not cuda_resources.OBJECT.exists() or cuda_resources.find_cuobjdump() is None,
    reason="no CUDA object in this checkout, or no cuobjdump to read it",
)


@needs_object
def test_every_architecture_without_spills(capsys):
    assert cuda_resources.main([]) == 0
    printed = capsys.readouterr().out
    assert "not acceptable: 0" in printed
    for arch in ("sm_80", "sm_90a", "sm_100a", "sm_120"):
        for kernel in ("add_epilogue", "gelu_backward", "layer_norm_forward_warp", "layer_norm_backward_warp", "gather"):
            assert any(line.split()[:2] == [f"{kernel}_kernel", arch] for line in printed.splitlines())


@needs_object
def test_no_driver_and_no_cublas_is_linked():
    """torch brings cuBLAS, and the driver is opened by the runtime inside: an object linked to them would load nowhere else."""
    printed = subprocess.run(["readelf", "-d", str(cuda_resources.OBJECT)], capture_output=True, text=True, check=True).stdout
    needed = [line.rpartition("[")[2].rstrip("]") for line in printed.splitlines() if "(NEEDED)" in line]
    assert not [name for name in needed if name.startswith(("libcuda", "libcublas", "libpython"))]


PRINTED = """
arch = sm_80
 Function _ZN8vit_fast39_GLOBAL__N__1cd1fd2c_7_gelu_cu_e1458cdd13gather_kernelILi8EhfEEvv:
  REG:56 STACK:{stack} SHARED:9216 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = {arch}
 Function _Z6kernelv:
  REG:21 STACK:0 SHARED:0 LOCAL:{local} CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_verdict_on_resources():
    usages = cuda_resources.parse(PRINTED.format(stack=0, arch="sm_80", local=0))
    assert [(u.family, u.registers, u.spilled, u.shared) for u in usages] == [
        ("gather_kernel", 56, 0, 9216),
        ("kernel", 21, 0, 0),
    ]
    assert cuda_resources.faults(usages, ["sm_80"]) == []
    assert cuda_resources.faults(usages, ["sm_80", "sm_120"]) == ["sm_120: not in the object"]
    for stack, local in [(8, 0), (0, 16)]:
        [fault] = cuda_resources.faults(cuda_resources.parse(PRINTED.format(stack=stack, arch="sm_80", local=local)), ["sm_80"])
        assert f"spills {stack + local} bytes" in fault
    apart = cuda_resources.faults(cuda_resources.parse(PRINTED.format(stack=0, arch="sm_90a", local=0)), ["sm_80", "sm_90a"])
    assert len(apart) == 2 and apart[0].startswith("sm_80: without kernel") and apart[1].startswith("sm_90a: without gather")
    assert cuda_resources.faults([], ["sm_80"]) == ["no kernel in it"]


def test_what_cannot_be_read(tmp_path, capsys):
    assert cuda_resources.main([str(tmp_path / "none.so")]) == 2
    assert "build it first" in capsys.readouterr().err or cuda_resources.find_cuobjdump() is None
    if cuda_resources.find_cuobjdump() is not None:
        (tmp_path / "text.so").write_text("not an object")
        assert cuda_resources.main([str(tmp_path / "text.so")]) == 2
        assert "can't read" in capsys.readouterr().err


# ---- What is registered, chosen and refused: no GPU needed ----------------------------------------------------------


@loaded
def test_registered():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [str(schema.name) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("vit_fast_cpp::")]
    with_kernels = {name.removeprefix("vit_fast_cpp::") for name in names if has(name, "CUDA")}
    wanted = {"linear_fwd", "linear_dgelu_bwd", "epilogue_bwd", "layer_norm_fwd", "layer_norm_bwd"}
    assert with_kernels == wanted | {"patch_embed_fwd", "patch_embed_bwd"}


@loaded
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chosen_by_name_only(dtype):
    """On fakes of CUDA tensors: every operation but attention takes them by name, and ``auto`` doesn't yet."""
    with FakeTensorMode(), backends.use("cpp"):
        x, weight = (torch.empty(size, device="cuda", dtype=dtype) for size in ((2, 5, 16), (16,)))
        y, total = vit_fast.ops.layer_norm(x, weight, weight, residual=x)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "cuda") == (total.shape, total.dtype, total.device.type)
        matrix = torch.empty(24, 16, device="cuda", dtype=dtype)
        assert vit_fast.ops.linear(x, matrix, None, "gelu_tanh").shape == (2, 5, 24)
        images = torch.empty(2, 3, 8, 8, device="cuda", dtype=dtype)
        parameters = (torch.empty(size, device="cuda", dtype=dtype) for size in ((6, 3, 4, 4), (6,), (1, 1, 6), (1, 5, 6)))
        assert vit_fast.ops.patch_embed(images, *parameters).shape == (2, 5, 6)
        with pytest.raises(RuntimeError, match="attention: implementation 'cpp' cannot run: its attention is for CPUs"):
            vit_fast.ops.attention(torch.empty(1, 4, 3, 2, 8, device="cuda", dtype=dtype), 2)
        wide = torch.empty(2, 16, device="cuda", dtype=torch.float64)
        with pytest.raises(RuntimeError, match="on cuda it takes float32, float16, bfloat16, got float64"):
            vit_fast.ops.layer_norm(wide, wide[0], wide[0])
        with pytest.raises(RuntimeError, match="x's rows must not overlap"):
            vit_fast.ops.linear(x[0, :1].expand(5, 16), matrix, None, "gelu")
        with pytest.raises(RuntimeError, match="a weight's rows must not overlap"):
            vit_fast.ops.linear(x, matrix[:1].expand(24, 16), None, "gelu")
        assert vit_fast.ops.linear(x, matrix[:, :16].t().contiguous().t(), None, "gelu").shape == (2, 5, 24)
        with backends.use("auto"):
            reason = backends.OPERATIONS["layer_norm"].reason_against("cpp", x, weight, weight, 1e-6, None)
            assert reason == "under 'auto' it serves CPUs only: nobody has timed it on a GPU"


X, W, B = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6)
IMAGES, EMBEDDING = torch.zeros(2, 3, 8, 8), (torch.zeros(6, 3, 4, 4), B, torch.zeros(1, 1, 6), torch.zeros(1, 5, 6))
REFUSED = [
    ("layer_norm_fwd", (X, B, X[0], 1e-6, None), r"layer_norm_fwd: weight must be \[8\], got \[6\]"),
    ("layer_norm_fwd", (X, X[0], X[0], 1e-6, X[:3]), r"layer_norm_fwd: residual must be \[4, 8\], got \[3, 8\]"),
    ("layer_norm_fwd", (X.double(), X[0], X[0], 1e-6, None), "x must be float32 or float16 or bfloat16, got float64"),
    ("layer_norm_fwd", (X.t(), X[:, 0], X[:, 0].clone(), 1e-6, None), "x must be rows of contiguous values"),
    ("layer_norm_bwd", (X[:3], X, X[0], X[:, 0], X[:, 0], None), r"layer_norm_bwd: dy must be \[4, 8\], got \[3, 8\]"),
    ("linear_fwd", (X, W.half(), B, None, None, False), "linear_fwd: weight must be float32, got float16"),
    ("linear_fwd", (X, W, B[:5], None, None, False), r"linear_fwd: bias must be \[6\], got \[5\]"),
    ("linear_fwd", (X[:, :7], W, B, None, None, False), "linear_fwd: x's last axis must be 8 as weight's"),
    ("linear_fwd", (X, W, B, "relu", None, False), "activation must be 'gelu' or 'gelu_tanh', got 'relu'"),
    ("linear_fwd", (X, W, B, None, X, False), r"linear_fwd: residual must be \[4, 6\], got \[4, 8\]"),
    ("linear_fwd", (X, torch.zeros(12, 16)[::2, ::2], B, None, None, False), "weight must be contiguous along one axis"),
    ("linear_dgelu_bwd", (X, W.t(), X, "gelu"), r"linear_dgelu_bwd: z must be \[4, 6\], got \[4, 8\]"),
    ("epilogue_bwd", (X, X[:2], "gelu"), r"epilogue_bwd: dy must be \[2, 8\], got \[4, 8\]"),
    ("epilogue_bwd", (X, None, None), "epilogue_bwd: z and an activation must be there"),
    ("epilogue_bwd", (X, X, "gelu", 0.5), "epilogue_bwd: on a GPU dropout_p and stochastic_depth_p must be 0, got 0.5 and 0"),
    ("linear_fwd", (X, W, B, None, None, False, 0.0, 0.5), "linear_fwd: on a GPU dropout_p and stochastic_depth_p must be 0"),
    ("linear_dgelu_bwd", (X, W.t(), X, "gelu", 0.5), "linear_dgelu_bwd: on a GPU dropout_p and stochastic_depth_p must be 0"),
    ("patch_embed_fwd", (IMAGES[0], *EMBEDDING, None, None), "images must have 4 axes"),
    ("patch_embed_fwd", (IMAGES.byte(), *EMBEDDING, None, None), "uint8 images need mean and std, got neither"),
    ("patch_embed_fwd", (IMAGES[:, :, :3], *EMBEDDING, None, None), "hold no patch of"),
    ("patch_embed_bwd", (IMAGES, IMAGES, EMBEDDING[0], None, None, False), r"dout must be \[2, 5, 6\]"),
]


@loaded
@pytest.mark.parametrize("name, arguments, message", REFUSED, ids=[f"{r[0]} {i}" for i, r in enumerate(REFUSED)])
def test_refused_before_anything_is_done(name, arguments, message):
    """The launchers check before they touch a device, so that CPU tensors, brought past the dispatcher, are enough."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name).default.redispatch(cuda, *arguments)


# ---- On a GPU -------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The rows of B, L, H and Ti, of one chunk, wider than registers hold, and what 16-byte accesses don't fit.
LAYER_NORM_SHAPES = [*test_layer_norm.SHAPES, (197, 768), (2, 257, 1280), (300, 1024), (65, 192), (33, 8192), (5, 70000)]
LINEAR_SHAPES = [*test_linear.SHAPES, ((2, 197), 768, 3072), ((257,), 1280, 640), ((64,), 30, 20), ((1,), 768, 1000)]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES, ids=str)
def test_layer_norm_results(shape, residual, dtype, nan_filled_memory):
    test_layer_norm.check("cpp", test_layer_norm.inputs(shape, dtype, torch.device("cuda"), residual))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", test_layer_norm.EXTREME)
def test_layer_norm_extremes(name, dtype):
    x, weight, bias, _ = test_layer_norm.inputs((9, 104), torch.float64, torch.device("cuda"))
    tensors = [t.to(dtype) for t in (test_layer_norm.EXTREME[name](x), weight, bias)]
    test_layer_norm.check("cpp", [*tensors, None])


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_linear_results(residual, activation, shape, dtype, nan_filled_memory):
    inputs = test_linear.linear_inputs(*shape, dtype, torch.device("cuda"), residual=residual)
    test_linear.check(test_linear.linear_of(activation), "cpp", inputs)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*test_linear.MLP_SHAPES, ((2, 197), 768, 3072)], ids=str)
@pytest.mark.parametrize("activation, residual", [("gelu", True), ("gelu_tanh", False), ("gelu_tanh", True)])
def test_mlp_results(activation, residual, shape, dtype, nan_filled_memory):
    inputs = test_linear.mlp_inputs(*shape, dtype, torch.device("cuda"), residual)
    test_linear.check(test_linear.mlp_of(activation), "cpp", inputs)


@on_gpu
def test_linear_strides():
    device = torch.device("cuda")
    x, weight, bias, residual = test_linear.linear_inputs((4, 6), 24, 40, torch.float16, device, residual=True)
    wide = randn(4, 6, 64, dtype=torch.float16, device=device)
    layouts = [
        (wide[..., 8:32], weight, bias, wide[..., 24:]),
        (x[:, 2], weight, bias, residual[:, 3]),
        (x, weight.t().contiguous().t(), bias, residual),
        (x, randn(40, 64, dtype=torch.float16, device=device)[:, 3:27], bias, residual),
        (x[0], weight, bias, residual[0, :1].expand(6, 40)),
    ]
    for tensors in layouts:
        for activation in ("gelu", "gelu_tanh", None):
            test_linear.check(test_linear.linear_of(activation), "cpp", tensors)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, patch, width", [*test_patch_embed.SHAPES, ((3, 3, 224, 224), (16, 16), 768)])
def test_patch_embed_results(shape, patch, width, dtype, nan_filled_memory):
    images = test_patch_embed.draw_images(shape, dtype, torch.device("cuda"))
    parameters = test_patch_embed.parameters(images, patch, width, dtype, torch.device("cuda"))
    test_patch_embed.check("cpp", (images, *parameters))


@on_gpu
@pytest.mark.parametrize("kind, dtype, normalised", test_patch_embed.KINDS)
@pytest.mark.parametrize("layout", test_patch_embed.LAYOUTS)
def test_patch_embed_layouts(layout, kind, dtype, normalised):
    device = torch.device("cuda")
    images = test_patch_embed.LAYOUTS[layout](test_patch_embed.draw_images((2, 3, 16, 40), kind, device))
    parameters = test_patch_embed.parameters(images, (8, 8), 24, dtype, device)
    test_patch_embed.check("cpp", (images, *parameters), normalised)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """16-bit products, float32 parameters and residual: the wider one decides."""
    device = torch.device("cuda")
    tensors = test_linear.mlp_inputs((3, 11), 16, 24, torch.float32, device, residual=True)

    def of(name, enabled=True):
        inputs = tensors if enabled else [t if t is None else t.double() for t in tensors]
        with backends.use(name), torch.autocast("cuda", dtype, enabled=enabled):
            outputs, gradients = with_gradients(test_linear.mlp_of("gelu"), inputs)
        return [*outputs, *(g for g in gradients if g is not None)]

    for a, r, e in zip(of("cpp"), of("reference"), of("reference", enabled=False), strict=True):
        vit_fast.testing.assert_within_budget(a, r, e, dtype=dtype)


def _forward(tensors, images, parameters):
    x, weight, bias, residual = tensors
    y = vit_fast.ops.linear(x, weight, bias, "gelu", residual)
    tanh = vit_fast.ops.linear(x, weight, bias, "gelu_tanh")
    norm, _ = vit_fast.ops.layer_norm(y, bias, bias, 1e-6, residual)
    return y, tanh, norm, vit_fast.ops.patch_embed(images, *parameters)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_and_streams(dtype):
    """Captured after a call or before any, replayed on new data; and on a stream that is not the default one."""
    device = torch.device("cuda")
    tensors = test_linear.linear_inputs((40,), 64, 48, dtype, device, residual=True)
    images = randn(2, 3, 32, 32, dtype=dtype, device=device)
    parameters = test_patch_embed.parameters(images, (16, 16), 48, dtype, device)
    with backends.use("cpp"), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # shapes that nothing has timed yet
            captured = _forward(tensors, images, parameters)
        for t in (tensors[0], images):
            t.copy_(torch.randn_like(t))
        graph.replay()
        eager = _forward(tensors, images, parameters)
        with torch.cuda.stream(stream):
            beside = _forward(tensors, images, parameters)
        torch.cuda.synchronize()
        # What is chosen inside a capture is cuBLASLt's first proposal, not the one that is timed: equal within rounding.
        for a, b, c in zip(captured, eager, beside, strict=True):
            assert torch.equal(b, c)
            assert (a.double() - b.double()).abs().max() <= 16 * torch.finfo(dtype).eps * b.double().abs().max()


@on_gpu
def test_the_same_in_every_run():
    device = torch.device("cuda")
    tensors = test_linear.mlp_inputs((2, 197), 256, 1024, torch.bfloat16, device, residual=True)
    rows = test_layer_norm.inputs((400, 768), torch.bfloat16, device, True)

    def results():
        with backends.use("cpp"):
            mlp = with_gradients(test_linear.mlp_of("gelu"), tensors)
            norm = with_gradients(lambda x, w, b, r: vit_fast.ops.layer_norm(x, w, b, 1e-6, r), rows)
        return [*mlp[0], *mlp[1], *norm[0], *norm[1]]

    first = results()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, results(), strict=True))


@on_gpu
def test_empty_on_a_gpu():
    device = torch.device("cuda")
    with backends.use("cpp"):
        x, weight, bias, residual = test_layer_norm.inputs((0, 5, 16), torch.float32, device, residual=True)
        outputs, gradients = with_gradients(
            lambda x, w, b, r: vit_fast.ops.layer_norm(x, w, b, 1e-6, r), (x, weight, bias, residual)
        )
        assert outputs[0].shape == (0, 5, 16) and not gradients[1].any() and not gradients[2].any()
        tensors = test_linear.mlp_inputs((0, 5), 16, 24, torch.float32, device, residual=True)
        outputs, gradients = with_gradients(test_linear.mlp_of("gelu_tanh"), tensors)
        assert outputs[0].shape == (0, 5, 16) and not any(g.any() for g in gradients)
        images = randn(0, 3, 8, 8, device=device)
        parameters = test_patch_embed.parameters(images, (4, 4), 6, torch.float32, device)
        outputs, gradients = with_gradients(vit_fast.ops.patch_embed, (images, *parameters))
        assert outputs[0].shape == (0, 5, 6) and not any(g.any() for g in gradients)


@on_gpu
def test_past_2_to_31_on_a_gpu():
    """Row 2 lies 2**31 elements behind row 0; a 32-bit product of row and stride points as far before it instead."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of the GPU's memory")
    stride = 2**30
    storage = torch.empty(4 * stride + 4096, dtype=torch.bfloat16, device="cuda")
    storage[:4096] = 0

    def far(tensor, column=0):
        return storage.as_strided(tensor.shape, (stride, 1), 2 * stride + column).copy_(tensor)

    device = torch.device("cuda")
    x, weight, bias, residual = test_linear.linear_inputs((3,), 40, 24, torch.bfloat16, device, residual=True)
    expected = ops.linear_fwd(x, weight, bias, "gelu", residual, True)
    actual = ops.linear_fwd(far(x), weight, bias, "gelu", far(residual, column=64), True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    rows, weight, bias, residual = test_layer_norm.inputs((3, 40), torch.bfloat16, device, True)
    expected = ops.layer_norm_fwd(rows, weight, bias, 1e-6, residual)
    actual = ops.layer_norm_fwd(far(rows), weight, bias, 1e-6, far(residual, column=64))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
