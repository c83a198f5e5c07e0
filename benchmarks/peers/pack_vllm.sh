#!/usr/bin/env bash
# pack_vllm.sh FOLDER: packs vLLM for a machine without a network that has a Hopper GPU, x86-64, Python 3.12, torch 2.11
# with CUDA 13, transformers 5.17 with what they need and a glibc of 2.39, in under 40 MiB; unpack_vllm.sh unpacks it there. What a dense
# model in bfloat16 does not run is left out: models of other kinds, or quantised ones, must not be timed with it.
# Needs python3, pip, tar and xz. VLLM_WHEEL: a wheel that lies here already.
set -euo pipefail
version=0.24.0
out=${1:?usage: pack_vllm.sh FOLDER}
work=$(mktemp -d /tmp/pack_vllm.XXXXXX)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$out"
for_target=(--no-deps --disable-pip-version-check --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for glibc in 2_39 2_35 2_34 2_31 2_28 2_26 2_24 2_17 2_12 2_5; do for_target+=(--platform "manylinux_${glibc}_x86_64"); done
for_target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 --platform any)

if [ -n "${VLLM_WHEEL:-}" ]; then
    cp "$VLLM_WHEEL" "$work/"
else
    python3 -m pip download -q "${for_target[@]}" -d "$work" "vllm==$version"
fi
wheel=("$work"/vllm-"$version"-*.whl)

# What a dense model needs on Hopper: FA2's library, the MoE, MLA and fp4 kernels, deep_gemm, the Rust front end are left out. FA3 is
# not: without one of FA2 and FA3, `vllm.model_executor.layers.attention` does not import on CUDA.
python3 - "${wheel[0]}" "$site" <<'PY'
import re
import sys
import zipfile

wheel, site = sys.argv[1:]
out = re.compile(
    r"vllm/(vllm-rs$|_rust|_moe_C|_flashmla|_qutlass|vllm_flash_attn/(_vllm_fa2|cute/)"
    r"|third_party/(deep_gemm|fmha_sm100)/|entrypoints/serve/instrumentator/static/)|.*\.(jpg|png|md)$"
)
with zipfile.ZipFile(wheel) as z:
    z.extractall(site, [n for n in z.namelist() if not out.match(n)])
PY

# Of each fat binary keep the cubins for sm_90. Those without any (Marlin for other architectures, fp8 of sm_89, fp4: none is
# run by a bf16 model) get the file's smallest cubin of another architecture, since an empty one might not load.
python3 - "$site/vllm/_C_stable_libtorch.abi3.so" <<'PY'
import struct
import sys

path = sys.argv[1]
data = bytearray(open(path, "rb").read())
(table,) = struct.unpack_from("<Q", data, 40)
count, names = struct.unpack_from("<HH", data, 60)
sections = [struct.unpack_from("<IIQQQQ", data, table + 64 * i) for i in range(count)]
start, size = next(s[4:6] for s in sections if data[sections[names][4] + s[0] :].startswith(b".nv_fatbin\0"))
at, fatbins = start, []
while at < start + size:
    magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
    if magic != 0xBA55ED50:
        assert not any(data[at : at + 8]), "neither a fat binary nor padding"
        at += 8
        continue
    entries, here = [], at + header
    while here < at + header + length:
        kind, _, head, body = struct.unpack_from("<HHIQ", data, here)
        (arch,) = struct.unpack_from("<I", data, here + 28)
        assert kind in (1, 2) and 50 <= arch <= 130, (kind, arch)
        entries.append((kind, arch, bytes(data[here : here + head + body])))
        here += head + body
    assert here == at + header + length
    fatbins.append((at, header, length, entries))
    at = here
filler = min((e for *_, es in fatbins for k, a, e in es if k == 2 and a != 90), key=len)
kept_bytes = 0
for at, header, length, entries in fatbins:
    body = b"".join(e for k, a, e in entries if k == 2 and a == 90) or filler
    assert len(body) <= length
    data[at + header : at + header + length] = body.ljust(length, b"\0")
    struct.pack_into("<Q", data, at + 8, len(body))
    kept_bytes += len(body)
print(f"_C: {len(fatbins)} fat binaries, {kept_bytes / 2**20:.1f} of {size / 2**20:.1f} MiB of device code kept")
open(path, "wb").write(data)
PY

# Dependencies beyond torch and transformers, of versions that vLLM accepts.
python3 -m pip install -q "${for_target[@]}" --no-compile --no-warn-script-location --root-user-action ignore --target "$site" \
    annotated_types==0.8.0 apache_tvm_ffi==0.1.9 astor==0.8.1 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 \
    compressed_tensors==0.17.0 depyf==0.20.0 dill==0.4.1 fastapi==0.136.3 httpcore2==2.16.2 httpx2==2.16.2 \
    jiter==0.19.0 jsonschema==4.26.0 jsonschema_specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6 \
    msgspec==0.22.0 openai==3.57.0 openai_harmony==0.0.8 partial_json_parser==0.2.1.1.post7 pybase64==1.5.1 \
    pydantic==2.14.4 pydantic_core==2.50.5 pyzmq==27.3.0 referencing==0.37.0 rpds_py==2026.9.1 \
    setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0 typing_inspection==0.4.5 uvicorn==0.54.0 \
    xgrammar==0.2.3
rm -rf "$site/bin" "$site/xgrammar/lib"
if command -v strip > /dev/null; then strip --strip-unneeded "$site/xgrammar/libxgrammar_bindings.so"; fi
find "$site" -depth -type d \( -name __pycache__ -o -name tests \) -exec rm -rf {} +

# Of blocks, so that unpacking uses every core.
tar -C "$site" --sort=name --owner=0 --group=0 --mtime=@0 -cf - . | xz -9e -T2 --block-size=8MiB > "$out/vllm.tar.xz"
(cd "$out" && sha256sum -- vllm.tar.xz > SHA256SUMS)
ls -l "$out"
