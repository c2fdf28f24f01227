"""Completions by vLLM, with the policy's weights in it: in the training process, or by servers.

in_process.py    `VLLMSampler`: an engine in the training process
deferred.py      weights that are computed where an engine in this process copies them
servers.py       `VLLMServerSampler`: servers reached over HTTP
server_checks.py whether a server can complete for the policy
server_client.py one server: what it says of itself, its requests, its weights
dispatch.py      spreads the requests of a rollout over servers
outage.py        how long servers that cannot be used are waited for
completing.py    what both ask of vLLM and make of its answers
names.py         what is used of vLLM, and which version has it
adapter.py       LoRA that is given to vLLM apart from the base
isolated_process.py  keeps vLLM from changing the process that it is in
transfer.py      sends weights to servers
receiver.py      receives them, in the server
"""

BACKEND = "hybrid_lightning"  # our way to receive weights, as --weight-transfer-config '{"backend": "hybrid_lightning"}' names it
LACKS = "the policy lacks"  # begins what a server says that has other weights than the policy
NO_LORA = "vLLM has no LoRA"  # begins what a server says that cannot compute with an adapter


def register() -> None:
    """Tell vLLM of it, in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM may call this more than once in a process
        WeightTransferEngineFactory.register_engine(BACKEND, "hybrid_lightning.rollout.vllm.receiver", "GlooReceiver")
