"""Write ``tests/model/tensorflow`` anew: tiny checkpoints made by TensorFlow itself.

    pip install . tensorflow-cpu==2.21.0 cramjam==2.14.0
    python tests/model/make_tensorflow_checkpoints.py

The tests need neither; they read what this wrote. TensorFlow stores its index uncompressed, in one
block, and offers no way to change that. So ``compressed.index`` has the entries of one of its
indices in two blocks, compressed by the snappy library; TensorFlow reads it back here.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import cramjam
import numpy as np
import tensorflow as tf
from tables import table
from tensorflow_values import CONFIG, VOCAB, body, heads, values

from bertfast.model.tensorflow import read_table

v1 = tf.compat.v1
HERE = Path(__file__).resolve().parent / "tensorflow"


def slots(shapes):
    """What Google's optimizer stores beside the weights."""
    names = {
        f"{name}/{slot}": shape for name, shape in shapes.items() for slot in ("adam_m", "adam_v")
    }
    return {**names, "global_step": ()}


def save(prefix: str, shapes, dtype=tf.float32, **options) -> None:
    """A checkpoint as ``tf.compat.v1.train.Saver`` writes it."""
    path = HERE / prefix
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), v1.Session() as session:
        for name, shape in shapes.items():
            kind = tf.int64 if name == "global_step" else dtype
            initial = np.int64(1000) if name == "global_step" else values(name, shape)
            v1.get_variable(name, initializer=tf.cast(initial, kind), use_resource=False)
        session.run(v1.global_variables_initializer())
        step = options.pop("step", None)
        saver = v1.train.Saver(save_relative_paths=True, **options)
        saver.save(session, str(path), global_step=step, write_meta_graph=False,
                   write_state=step is not None)  # fmt: skip


def save_shards(prefix: str, shapes, shards: int) -> None:
    """As a sharded Saver does it on as many machines: one part each, then one index of all."""
    path = HERE / prefix
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(shapes)
    parts = []
    for shard in range(shards):
        mine = names[shard::shards]
        parts.append(f"{path}_temp/part-{shard:05d}-of-{shards:05d}")
        tf.raw_ops.SaveV2(
            prefix=parts[-1], tensor_names=mine, shape_and_slices=[""] * len(mine),
            tensors=[tf.constant(values(name, shapes[name])) for name in mine],
        )  # fmt: skip
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(path))


def save_partitioned(prefix: str, shapes) -> None:
    """The word table in two slices, as a partitioner makes it."""
    path = HERE / prefix
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), v1.Session() as session:
        for name, shape in shapes.items():
            halves = v1.fixed_size_partitioner(2) if "word_embeddings" in name else None
            v1.get_variable(
                name, shape, partitioner=halves, initializer=v1.zeros_initializer(),
                use_resource=False,
            )  # fmt: skip
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(path), write_meta_graph=False, write_state=False)


def compress_index(source: Path, target: Path) -> None:
    """Compress every block of an index. Its entries are those that bertfast reads in it; that they
    are TensorFlow's own is seen when TensorFlow reads the result."""
    entries = list(read_table(source))
    middle = len(entries) // 2
    blocks = [entries[:middle], entries[middle:]]
    target.write_bytes(table(blocks, lambda data: bytes(cramjam.snappy.compress_raw(data))))


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    pretraining = {**body(), **heads()["pretraining"]}
    save("pretraining/bert_model.ckpt", {**pretraining, **slots(pretraining)})
    save_shards("sharded/bert_model.ckpt", pretraining, 3)
    classifier = {**body(), **heads()["classifier"]}
    save("classifier/model.ckpt", {**classifier, "global_step": ()}, tf.bfloat16, step=1000)
    save("squad/model.ckpt", {**body(), **heads()["squad"]}, tf.float16)
    for directory in ("pretraining", "sharded", "classifier", "squad"):
        config = json.dumps(CONFIG, indent=2) + "\n"
        (HERE / directory / "bert_config.json").write_text(config)
    (HERE / "pretraining" / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))

    compressed = HERE / "compressed.index"
    compress_index(HERE / "pretraining" / "bert_model.ckpt.index", compressed)
    shutil.copy(HERE / "pretraining/bert_model.ckpt.data-00000-of-00001",
                HERE / "compressed.data-00000-of-00001")  # fmt: skip
    reader = tf.train.load_checkpoint(str(HERE / "compressed"))
    for name, shape in pretraining.items():
        assert (reader.get_tensor(name) == values(name, shape)).all(), name
    (HERE / "compressed.data-00000-of-00001").unlink()

    save("other/resnet.ckpt", {"resnet/conv1/kernel": (3, 3), "resnet/conv1/bias": (3,)})
    save("other/version_1.ckpt", {"bert/pooler/dense/bias": (3,)}, write_version=1)
    save_partitioned("other/partitioned.ckpt", {"bert/embeddings/word_embeddings": (4, 2)})
    tf.train.Checkpoint(model=tf.Variable([1.0, 2.0])).write(str(HERE / "other/objects.ckpt"))


if __name__ == "__main__":
    main()
