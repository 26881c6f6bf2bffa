"""compressed-tensors and transformers, unmodified, against our readers and writers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.checkpoints.compressed_tensors import CompressedTensorsReader
from qjax.checkpoints.ct_writer import CompressedTensorsWriter
from qjax.checkpoints.export import save_model
from qjax.checkpoints.fp8_writer import Fp8Writer
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from tests.checkpoint_models import TINY, random_params, random_quantized
from tests.fake_checkpoints import LAYER, named, read_layer, source, value
from tests.tolerances import F32_LOGITS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")
compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

K, N = 64, 40
MX4 = QuantFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu")
MX8 = MX4.replace(qtype="float8_e4m3fn")


def to_torch(array):
    """A tensor with the same bytes."""
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array))


def from_torch(tensor):
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def int_format(bits, symmetric, group_size):
    if group_size is None:
        return QuantFormat(f"int{bits}", symmetric=symmetric)
    return QuantFormat(f"int{bits}", "group", group_size=group_size, symmetric=symmetric)


WRITTEN = [
    *(int_format(bits, sym, 32) for bits in range(2, 9) for sym in (True, False)),
    int_format(4, True, None),
    int_format(4, False, None),
    formats.INT8_TENSOR,
    formats.W8A8_INT8,
    formats.W8A8_FP8,
    formats.FP8_E4M3_TENSOR,
    QuantFormat("float8_e4m3fn", "block", block=(32, 16)),
    MX4,
    MX8,
]


def example(fmt, rng):
    """Codes over the whole range; scales as the format has them."""
    rows, groups = fmt.tiles((K, N), 0)
    shape = (-(-K // rows), -(-N // groups))
    half = 2 ** (fmt.bits - 1)
    if fmt.is_int:
        codes = rng.integers(-half, half, (K, N)).astype(np.int8)
    elif fmt.bits == 4:
        codes = rng.integers(0, 16, (K, N)).astype(np.uint8)
    else:
        codes = rng.uniform(-448, 448, (K, N)).astype(fmt.storage_dtype)
    mx = fmt.scale_dtype == "float8_e8m0fnu"
    scale = np.exp2(rng.integers(-5, 5, shape)) if mx else rng.uniform(0.01, 0.1, shape)
    zero = None if fmt.symmetric else rng.integers(-half, half, shape).astype(np.int8)
    storage = fmt.storage_dtype
    return QuantizedArray.make(
        codes.view(storage) if codes.dtype == np.uint8 else codes.astype(storage),
        scale.astype(jnp.dtype(fmt.scale_dtype)),
        fmt,
        zero_point=zero,
        dtype=jnp.float32,
    )


@pytest.mark.parametrize("fmt", WRITTEN, ids=lambda f: f.name)
def test_upstream_decompresses_what_we_write(fmt, rng):
    q = example(fmt, rng)
    writer = CompressedTensorsWriter(Linears({LAYER: q}, {}))
    config = quantization.QuantizationConfig.model_validate(writer.config())
    scheme = config.config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(str(scheme.format))
    made = writer.tensors(LAYER, q)
    tensors = {name.removeprefix(f"{LAYER}."): to_torch(array) for name, array in made.items()}
    weight = compressor.decompress(tensors, scheme)["weight"].float().numpy()
    np.testing.assert_array_equal(weight, value(q).T)


PRESETS = "W4A16 W4A16_ASYM W3A16 W8A16 W8A8 FP8 FP8_DYNAMIC FP8_BLOCK NVFP4A16 MXFP4A16 MXFP8A16"


@pytest.mark.parametrize("preset", PRESETS.split())
def test_we_read_what_upstream_compresses(preset, rng):
    k, n = 256, 136
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    scheme.format = compressed_tensors.compressors.format.infer_module_format(
        torch.nn.Linear, scheme
    )
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    module = torch.nn.Linear(k, n, bias=False)
    module.weight.data = weight
    quantization.initialize_module_for_quantization(module, scheme, force_zero_point=False)
    helpers = compressed_tensors.quantization.utils.helpers
    tiles = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}
    rows, columns = tiles.get(args.strategy, (1, args.group_size))
    pad = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    view = pad.reshape(pad.shape[0] // rows, rows, pad.shape[1] // columns, columns)
    low, high = view.amin((1, 3)), view.amax((1, 3))
    global_scale = None
    if preset == "NVFP4A16":
        global_scale = helpers.generate_gparam(low.min(), high.max()).reshape(1)
    scale, zero = helpers.calculate_qparams(low, high, args, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if args.strategy == "tensor":
        state["weight_scale"] = scale.reshape(1)
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format.value)
    packed = compressor.compress(state, scheme)
    wanted = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
    tensors = named({name: from_torch(tensor) for name, tensor in packed.items()})
    if preset == "FP8":
        tensors[f"{LAYER}.input_scale"] = np.ones(1, np.float32)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed"
    )
    reader = CompressedTensorsReader.from_source(source(tensors, config.model_dump(mode="json")))
    assert reader is not None
    q = read_layer(reader, tensors, (k, n))
    if preset == "NVFP4A16":
        # Upstream divides by the global scale in bfloat16; here it is a float32 factor.
        np.testing.assert_allclose(value(q).T, wanted, rtol=2**-7)
    else:
        np.testing.assert_array_equal(value(q).T, wanted)
    writer = CompressedTensorsWriter(Linears({LAYER: q}, {}, origin=tensors))
    again = writer.tensors(LAYER, q)
    for name, array in again.items():
        assert array.tobytes() == tensors[name].tobytes(), name
    if preset == "NVFP4A16":
        config = quantization.QuantizationConfig.model_validate(writer.config())
        state = {n.removeprefix(f"{LAYER}."): to_torch(array) for n, array in again.items()}
        theirs = compressor.decompress(state, config.config_groups["group_0"])["weight"]
        np.testing.assert_array_equal(theirs.float().numpy(), wanted)


def test_transformers_gives_our_logits(tmp_path):
    def kernel(leaf, seed):
        if leaf.layer == "lm_head":
            return None
        fmt = formats.INT8_CHANNEL if "down_proj" in leaf.layer else formats.INT4_G32
        q = random_quantized(leaf.shape, fmt, seed)
        scale = jnp.asarray(np.asarray(q.scale) * np.float32(2 / 2**fmt.bits))
        return QuantizedArray.make(q.qvalue, scale, fmt, zero_point=q.zero_point, dtype=jnp.float32)

    params = jax.tree.map(
        lambda x: x * np.float32(0.2) if x.dtype == np.float32 else x, random_params(TINY, kernel)
    )
    save_model(tmp_path / "m", TINY, params, "compressed-tensors", progress=False)
    tokens = np.arange(24).reshape(2, 12) % TINY.vocab_size
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    model = load_model(tmp_path / "m", progress=False)
    logits, _ = jax.jit(model.module.apply)(
        {"params": model.params}, jnp.asarray(tokens, jnp.int32)
    )
    np.testing.assert_allclose(logits, reference, rtol=0, atol=F32_LOGITS)


def test_transformers_dequantizes_our_fp8(rng):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    q = quantize(jnp.asarray(rng.standard_normal((256, 128)), jnp.float32), formats.W8A8_FP8_BLOCK)
    writer = Fp8Writer(Linears({LAYER: q}, {"lm_head": (8, 8)}))
    config = transformers.FineGrainedFP8Config.from_dict(writer.config())
    assert tuple(config.weight_block_size) == (128, 128)
    assert config.modules_to_not_convert == ["lm_head"]
    made = writer.tensors(LAYER, q)
    weight, scale = (to_torch(made[f"{LAYER}.{s}"]) for s in ("weight", "weight_scale_inv"))
    values = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    np.testing.assert_array_equal(values.numpy(), value(q).T)


def test_files_are_opened_by_safetensors(tmp_path):
    safe_open = functools.partial(pytest.importorskip("safetensors").safe_open, framework="np")

    fmt = formats.INT4_G32

    def kernel(leaf, seed):
        return None if leaf.layer == "lm_head" else random_quantized(leaf.shape, fmt, seed)

    params = random_params(TINY, kernel)
    save_model(tmp_path / "m", TINY, params, "compressed-tensors", progress=False)
    ours = SafetensorsCheckpoint(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name in ours:
            np.testing.assert_array_equal(theirs.get_tensor(name), ours[name])
