"""``TNTTrainer`` in two gloo processes: the update is that of one process with all rows."""

from __future__ import annotations

import os
import socket

import process
import pytest
import torch
import torch.distributed as dist
from hf_tiny import annotated, assert_same, config, parameters, tiny, trained

import tnt_kernels as tnt

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
CASES = [("gpt2", True), ("gpt2", False), ("t5", True), ("t5", False)]


def options(fused: bool) -> dict[str, object]:
    return {"fused_linear": fused, "method": "tnrf", "learning_rate": 1.0}


def models(kind: str):
    return tiny(kind).double(), tiny(kind, seed=1).double()


def worker(rank: int, folder: str, port: int) -> None:
    process.prepare()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = {f"{kind}-{fused}": replicated(folder, kind, fused) for kind, fused in CASES}
    found |= {f"sharded-{fused}": sharded(rank, folder, fused) for fused in (True, False)}
    torch.save(packed(rank, folder), f"{folder}/packed-{rank}.pt")
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def replicated(folder: str, kind: str, fused: bool) -> dict[str, object]:
    """DistributedDataParallel, as ``Trainer`` wraps it."""
    model, original = models(kind)
    args = config(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        **options(fused),
    )
    assert args.world_size == 2
    examples = annotated(8, encoder_decoder=kind == "t5")
    held_out = annotated(7, seed=2, encoder_decoder=kind == "t5")
    trainer = trained(model, args, examples, ref_model=original, eval_dataset=held_out)
    log = trainer.state.log_history[0]
    return {"parameters": parameters(model), "log": log, "eval": trainer.evaluate()}


def sharded(rank: int, folder: str, fused: bool) -> dict[str, torch.Tensor]:
    """FSDP2, in the units that accelerate makes, which itself has it on GPUs alone."""
    args = config(folder, ddp_backend="gloo", **options(fused))
    trainer = fully_sharded(tnt.hf.TNTTrainer(tiny("llama"), args, ref_model=tiny("llama", seed=1)))
    for _ in range(2):
        trainer.model.zero_grad()
        batch = trainer.data_collator(annotated(8)[rank::2])
        count = trainer._get_num_items_in_batch([batch], args.device)
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    assert (trainer._first_batch.head_math is not None) == fused
    return {name: x.grad.full_tensor() for name, x in trainer.model.named_parameters()}


def fully_sharded(trainer):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for model in (trainer.model, trainer.ref_model):
        for part in (*model.model.layers, model.model.embed_tokens):
            fully_shard(part, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
    trainer.is_fsdp_enabled = True
    return trainer


TEXTS = (slice(0, 4), slice(4, 5))  # of each process: several in its row, and one


def packed(rank: int, folder: str) -> float:
    """One process has texts to look at, the other has none, and both run the same forwards."""
    args = config(folder, ddp_backend="gloo", **options(True))
    trainer = fully_sharded(tnt.hf.TNTTrainer(tiny("llama"), args, ref_model=tiny("llama", seed=1)))
    trainer.data_collator.padding_free = True
    batch = trainer.data_collator(annotated(8)[TEXTS[rank]])
    return trainer.compute_loss(trainer.model.train(), batch).item()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(str(folder), port), nprocs=2)
    found = torch.load(folder / "found.pt", weights_only=False)
    found["packed"] = [torch.load(folder / f"packed-{rank}.pt") for rank in range(2)]
    return found


@pytest.mark.parametrize(("kind", "fused"), CASES)
def test_replicas(found, kind, fused, tmp_path):
    model, original = models(kind)
    initial = parameters(model)
    trainer = trained(
        model, config(tmp_path, **options(fused)), annotated(8, encoder_decoder=kind == "t5"), ref_model=original,
        eval_dataset=annotated(7, seed=2, encoder_decoder=kind == "t5"),
    )  # fmt: skip
    both = found[f"{kind}-{fused}"]
    assert_same(parameters(model), both["parameters"], initial, 1e-6)
    for name in ("loss", "negative_mass", "ref_negative_mass", "positive_kl", "negative_share"):
        assert both["log"][name] == pytest.approx(trainer.state.log_history[0][name], rel=1e-5)
    expected = trainer.evaluate()
    for name in ("eval_loss", "eval_negative_mass", "eval_negative_share"):  # one of 7 comes twice
        assert both["eval"][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_shards(found, fused, tmp_path):
    trainer = tnt.hf.TNTTrainer(
        tiny("llama"), config(tmp_path, **options(fused)), ref_model=tiny("llama", seed=1)
    )
    batch = trainer.data_collator(annotated(8))
    trainer.compute_loss(trainer.model, batch).backward()
    for name, x in trainer.model.named_parameters():
        torch.testing.assert_close(
            found[f"sharded-{fused}"][name], x.grad, rtol=1e-3, atol=1e-5, msg=name
        )


def test_shards_of_packed_rows(found, tmp_path):
    trainer = tnt.hf.TNTTrainer(
        tiny("llama"), config(tmp_path, **options(True)), ref_model=tiny("llama", seed=1)
    )
    for texts, loss in zip(TEXTS, found["packed"], strict=True):
        batch = trainer.data_collator(annotated(8)[texts])
        assert loss == pytest.approx(trainer.compute_loss(trainer.model, batch).item(), rel=1e-5)
