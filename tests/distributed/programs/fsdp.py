"""FSDP2 laid over the models by accelerate's own function, against the same models whole: losses, gradients, saving.

accelerate puts DistributedDataParallel in FSDP2's place on CPU, so that function is called here by hand.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from common import ARGUMENTS, build, check_processes, collator_of, difference, load_log, num_processes, rank, report
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.training.optimization import build_optimizer, clip_gradients
from flip_hf.training.settings import TrainingSettings


def shard(model, policy):
    config = ARGUMENTS["config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"],
        auto_wrap_policy=config["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=[config["fsdp_transformer_layer_cls_to_wrap"]],
        reshard_after_forward=config["fsdp_reshard_after_forward"],
        cpu_ram_efficient_loading=config["fsdp_cpu_ram_efficient_loading"],
        mixed_precision_policy=policy,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    in_place_of_accelerator = SimpleNamespace(
        state=state, mixed_precision="no", is_main_process=rank() == 0, device=torch.device("cpu")
    )
    return fsdp2_prepare_model(in_place_of_accelerator, model)


processor, rows = load_log()
cases = {
    "pretraining": (FlipForPreTraining, {}),
    "mlm": (FlipForPreTraining, {"objectives": {"mlm": 1.0}}),
    "nce": (FlipForPreTraining, {"mtm_loss": "nce", "mtm_num_negatives": 500}),
    "joint": (FlipForCTR, {"backbone": "fm", "backbone_options": {}}),
    "gated": (FlipForCTR, {"fusion": "gated"}),
    "text": (FlipForCTR, {"mode": "text"}),
}
batches, wholes, numbers, losses = {}, {}, {}, {}
for case, (cls, settings) in cases.items():
    wholes[case] = build(cls, processor, **settings)
    collator = collator_of(cls, processor, settings.get("mode", "joint"))
    batches[case] = collator([rows[i] for i in range(12)])
    numbers[case] = {name: number.float() for name, number in wholes[case].num_items(batches[case]).items()}
    loss = wholes[case](**batches[case], num_items_in_batch=numbers[case]).loss
    loss.backward()
    losses[case] = loss.item()

accelerator = Accelerator(cpu=True)
check_processes()
found = {}
for case, (cls, settings) in cases.items():
    batch = {name: values[rank() :: num_processes()] for name, values in batches[case].items()}
    own_numbers = {name: number / num_processes() for name, number in numbers[case].items()}
    model = shard(build(cls, processor, **settings), None)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model(**batch, num_items_in_batch=own_numbers).loss.backward()
    expected = dict(wholes[case].named_parameters())
    names = [name for name, _ in model.named_parameters()]
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    found[case] = {"gradients": difference(gradients, [expected[name].grad for name in names])}

    norm = torch.nn.utils.clip_grad_norm_(wholes[case].parameters(), 0.5)
    torch.testing.assert_close(clip_gradients(model, accelerator, 0.5), norm, rtol=1e-5, atol=0)

    # A step, an evaluation, another step: nothing may be read that an earlier one left behind.
    build_optimizer(model, TrainingSettings()).step()
    with torch.no_grad():
        output = model.eval()(**batch)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    folder = Path(ARGUMENTS["report"]).parent / case
    if rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
    dist.barrier()
    loaded = cls.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(output.loss, loaded.eval()(**batch).loss, rtol=1e-5, atol=0)
    assert not torch.equal(next(loaded.parameters()), next(wholes[case].parameters()))
    model.train()(**batch).loss.backward()

    half = shard(build(cls, processor, **settings), MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    loss = half(**batch, num_items_in_batch=own_numbers).loss
    loss.backward()
    total = loss.detach().float() / num_processes()
    dist.all_reduce(total)
    found[case]["bf16 loss"] = [total.item(), losses[case]]
report(found)
