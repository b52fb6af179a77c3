"""Speed and memory of PoolFormer next to every other way of running it, in one interleaved run.

case.py        what is measured: mode, variant, precision, batch, image size, device
rows.py        the contestants: ours, transformers' built-in one, timm's, onnxruntime, OpenVINO
gate.py        what every contestant has to compute before it is timed
timing.py      turns, medians, spread, working memory
floor.py       FLOP and bytes of a model, and what this machine can do at most
comparison.py  one case: build, check, measure, time
growth.py      how cost grows with batch, pixels and depth
processors.py  image processors
exports.py     exports of this package next to OpenVINO and onnxruntime of the built-in model
loop.py        the training loop and its parts, each in a steady state, and the bottleneck
papers.py      the papers' comparison tables: published, counted and measured figures side by side
papers_page.py their page, CSV files and charts
peer_models.py the peers in them
predict.py     predict: reading, the model, both, and transformers' pipeline over the same files
report.py      tables, JSON, charts, targets
run.py         what the command asks for, one after the other
"""
