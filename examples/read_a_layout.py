"""Which rows of which tensor does each rank hold? The layout is a value that can be asked."""

from bireme.checkpoint.prepared import prepare_model
from bireme.config import ParallelConfig
from bireme.models.registry import model_layout

model = prepare_model("demo")
layout = model_layout(model.config, ParallelConfig.of((3, 2)))
for rank in layout.ranks:
    qkv = next(param for param in rank.params if param.name.endswith("self_attn.qkv.weight"))
    pieces = ", ".join(
        f"{piece.source.name.split('.')[-2]} rows {piece.box[0][0]}-{piece.box[0][1]}"
        for piece in qkv.pieces
    )
    print(f"rank {rank.rank}, stage {rank.stage}: {pieces}")
