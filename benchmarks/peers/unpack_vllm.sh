#!/usr/bin/env bash
# unpack_vllm.sh FOLDER SITE COMMAND: unpacks what pack_vllm.sh made in FOLDER into SITE, and makes COMMAND, an interpreter
# that has it in front of the machine's own packages: what `decode_gpu.py --vllm COMMAND` runs.
set -euo pipefail
folder=${1:?usage: unpack_vllm.sh FOLDER SITE COMMAND} site=${2:?where to unpack} command=${3:?the interpreter to make}
mkdir -p "$site" "$(dirname "$command")"
site=$(realpath "$site")
(cd "$folder" && sha256sum --quiet -c SHA256SUMS)
xz -dcT0 "$folder/vllm.tar.xz" | tar -C "$site" -xf -
python=$(command -v python3)
"$python" -m compileall -q -j 0 "$site" > /dev/null || true # as pip does; some files are of other versions of Python
cat > "$command" <<WRAPPER
#!/usr/bin/env bash
export PYTHONPATH=$(printf %q "$site") HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
exec $python "\$@"
WRAPPER
chmod +x "$command"
"$command" -c 'import sys, torch, vllm, vllm.v1.engine.core
from vllm.vllm_flash_attn import FA3_AVAILABLE
assert FA3_AVAILABLE and hasattr(torch.ops._C, "rms_norm")
print("vllm", vllm.__version__, "torch", torch.__version__, "python", sys.version.split()[0])'
