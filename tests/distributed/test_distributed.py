"""Several processes compute what one process computes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from waiting import PATIENCE

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.backbones import BACKBONES

pytestmark = pytest.mark.distributed
ONE, FOUR = (pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))
PROGRAMS = Path(__file__).parent / "programs"
CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "accelerate"


@pytest.mark.parametrize("processes", [ONE, 2, FOUR])
def test_gradients_are_those_of_one_process(torchrun, click_log, processes):
    found = torchrun("gradients", processes, click_log=str(click_log))
    assert set(found) == {"icl", "pretraining", "ctr"}
    for distance, scale in found.values():
        assert distance < 1e-6
        assert scale == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("processes", [2, FOUR])
def test_a_sharded_feature_table_is_the_whole_one(torchrun, click_log, field_names, processes):
    found = torchrun("sharded", processes, click_log=str(click_log), fields=field_names)
    errors = found.pop("errors")
    assert set(found) == {"FlipForPreTraining", "FlipForCTR"}
    for gradients in found.values():
        for distance, scale in gradients:
            assert distance < 1e-6
            assert scale == pytest.approx(1.0, abs=1e-6)
    for error, part in zip(
        errors, ["shard_features", "mtm_loss='full_softmax'", "push", "resize", "has the shape"], strict=True
    ):
        assert part in error


def trained(folder, cls):
    log = [json.loads(line) for line in (folder / cls.__name__ / "log.jsonl").read_text().splitlines()]
    steps = [[line["loss"], line["gradient_norm"]] for line in log if line["event"] == "train"]
    return torch.tensor(steps), cls.from_pretrained(folder / cls.__name__ / "model").state_dict()


@pytest.mark.slow
def test_ten_steps_of_the_loop_are_those_of_one_process(torchrun, click_log, tmp_path):
    for processes, sharded in ((1, False), (2, False), (2, True)):
        folder = tmp_path / f"{processes}-{sharded}"
        torchrun("training", processes, click_log=str(click_log), folder=str(folder), sharded=sharded)
    for cls in (FlipForPreTraining, FlipForCTR):
        steps, weights = trained(tmp_path / "1-False", cls)
        assert len(steps) == 10
        assert (steps[:, 1] > 0.5).any(), "nothing was clipped"
        for other in ("2-False", "2-True"):
            other_steps, other_weights = trained(tmp_path / other, cls)
            torch.testing.assert_close(other_steps, steps, rtol=1e-5, atol=0)
            # A step is up to 1e-3. ICL and MTM compute in single precision, and Adam magnifies its rounding.
            atol = 1e-12 if cls is FlipForCTR else 1e-5
            for name, value in weights.items():
                torch.testing.assert_close(other_weights[name], value, rtol=0, atol=atol)


def test_accumulated_batches_are_one_batch(torchrun, click_log):
    found = torchrun("accumulation", 2, click_log=str(click_log))
    for case in ("mlm", "mtm", "ctr", "student"):
        assert found[f"{case} 2"]["distance"] < 1e-6
        assert found[f"{case} 4"]["distance"] < 1e-6
        # Gradients are sent once a step, not once a batch.
        assert found[f"{case} 1"]["sent"] > 0
        assert found[f"{case} 1"]["sent"] == found[f"{case} 2"]["sent"] == found[f"{case} 4"]["sent"]


def test_every_parameter_is_used_in_every_mode(torchrun, click_log):
    assert torchrun("no_unused", 2, click_log=str(click_log))["runs"] == 15 + 3 + 1 + len(BACKBONES) + 1


@pytest.mark.parametrize("processes", [2, FOUR])
def test_evaluation_counts_every_row_once(torchrun, click_log, tmp_path, processes):
    found = torchrun("evaluation", processes, click_log=str(click_log), folder=str(tmp_path / "trainer"))
    assert found["logits"] < 1e-6
    assert max(found["fusion"]) < 1e-5, "of every process"
    shared, alone = found["metrics"]
    assert shared == pytest.approx(alone, abs=1e-7)
    shared, alone = found["groups"]
    assert shared == pytest.approx(alone, abs=1e-7)
    for value, expected in found["pretraining"]:
        assert value == pytest.approx(expected, rel=1e-6)


def test_fsdp2_computes_what_one_process_computes(torchrun, click_log):
    config = ClusterConfig.from_yaml_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    found = torchrun("fsdp", 2, click_log=str(click_log), config=config)
    assert set(found) == {"pretraining", "mlm", "nce", "joint", "gated", "text"}
    for case in found.values():
        distance, scale = case["gradients"]
        # Rounding: in the gated loss's gradient large parts of either sign cancel, and which they are is the seed's.
        assert distance < 5e-6
        assert scale == pytest.approx(1.0, abs=1e-6)
        loss, expected = case["bf16 loss"]
        assert loss == pytest.approx(expected, rel=2e-3)
        assert loss != expected


@pytest.mark.slow
def test_a_table_that_no_process_can_hold_is_trained_and_saved(torchrun, tmp_path):
    whole = torchrun("memory", 1, folder=str(tmp_path / "whole"))
    assert "can't allocate memory" in whole["error"]
    sharded = torchrun("memory", 2, folder=str(tmp_path / "sharded"))
    assert sharded["error"] is None
    table = FlipForCTR.from_pretrained(tmp_path / "sharded").flip.feature_embeddings.weight
    assert len(table) == sharded["rows"] > 1 << 20


@pytest.mark.slow
def test_accelerate_takes_the_configurations(tmp_path, click_log):
    for name in ("ddp", "ddp-multi-node", "fsdp2"):
        ClusterConfig.from_yaml_file(str(CONFIGS / f"{name}.yaml"))
    report = tmp_path / "report.json"
    arguments = json.dumps({"processes": 2, "report": str(report), "click_log": str(click_log)})
    program = [str(PROGRAMS / "gradients.py"), arguments]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_processes", "2"]

    one_machine = [*launch, "--config_file", str(CONFIGS / "ddp.yaml")]
    subprocess.run([*one_machine, "--main_process_port", "0", *program], check=True, capture_output=True)
    assert set(json.loads(report.read_text())) == {"icl", "pretraining", "ctr"}

    # Two machines, both of them this one.
    report.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    machines = [*launch, "--config_file", str(CONFIGS / "ddp-multi-node.yaml"), *address]
    started = [subprocess.Popen([*machines, "--machine_rank", str(rank), *program]) for rank in range(2)]
    assert [machine.wait(timeout=PATIENCE) for machine in started] == [0, 0]
    assert set(json.loads(report.read_text())) == {"icl", "pretraining", "ctr"}
