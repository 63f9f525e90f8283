"""A program: loads with `trust_remote_code=True` where flip_hf was never imported, and prints what came as JSON.

It takes cases as JSON. Each has a process of its own, forked off one that has imported transformers and not flip_hf:

    folder: what to load, a folder or a repository.
    loads: what to load it as, in this order: keys of AUTO, or "pipeline".
    hidden: whether flip_hf is not to be found.
    saves: where to save what was loaded.
    plain: two folders: flip_hf's own classes load the one and save to the other afterwards.
    row: what to score in the end.
"""

import json
import os
import sys

# These take long to import, and flip_hf imports them too.
import accelerate  # noqa: F401
import datasets  # noqa: F401
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor, pipeline

AUTO = {
    "config": AutoConfig,
    "base": AutoModel,
    "model": AutoModelForSequenceClassification,
    "processor": AutoProcessor,
}


def load(what, folder):
    if what == "pipeline":
        return pipeline("ctr-prediction", model=folder, trust_remote_code=True)
    return AUTO[what].from_pretrained(folder, trust_remote_code=True)


def run(folder, loads, hidden=False, saves=None, plain=None, row=None):
    assert "flip_hf" not in sys.modules
    if hidden:
        # Python's own way to say that there is no such module.
        sys.modules["flip_hf"] = None
    try:
        loaded = {what: load(what, folder) for what in loads}
    except ImportError as error:
        return {"error": str(error)}
    result = {"types": [f"{type(part).__module__}.{type(part).__name__}" for part in loaded.values()]}
    for part in loaded.values() if saves else ():
        part.save_pretrained(saves)
    if plain:
        import flip_hf

        for cls in (flip_hf.FlipForCTR, flip_hf.FlipProcessor):
            cls.from_pretrained(plain[0]).save_pretrained(plain[1])
    if row:
        pipe = loaded.get("pipeline") or pipeline("ctr-prediction", **loaded)
        result["probability"] = pipe(row)["probability"]
    return result


def in_a_process_of_its_own(case):
    reader, writer = os.pipe()
    if os.fork() == 0:
        with os.fdopen(writer, "w") as out:
            json.dump(run(**case), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.wait()
    return json.loads(text)


if __name__ == "__main__":
    print(json.dumps({name: in_a_process_of_its_own(case) for name, case in json.loads(sys.argv[1]).items()}))
