"""Completions by vLLM with the policy's weights: in the training process, or on servers.

in_process.py    `VLLMSampler`: an engine in the training process
deferred.py      weights that are computed where an engine in this process copies them
servers.py       `VLLMServerSampler`: servers reached over HTTP
server_checks.py whether a server can complete for the policy
server_client.py one server: its description, its requests, its weights
dispatch.py      distributes the requests of a rollout over servers
outage.py        how long to wait for servers that cannot be used
completing.py    requests to vLLM and its answers, common to both samplers
names.py         the parts of vLLM that are used, and the versions that have them
adapter.py       LoRA that vLLM receives separately from the base
isolated_process.py  keeps vLLM from changing its process
transfer.py      sends weights to servers
receiver.py      receives them, in the server, and loads them into a model of vLLM
"""

BACKEND = "hybrid_lightning"  # our weight transfer, as --weight-transfer-config '{"backend": "hybrid_lightning"}' names it
MISSING = "the policy does not have"  # begins the error of a server that has weights other than the policy's
NO_LORA = "vLLM has no LoRA"  # begins the error of a server that cannot compute with an adapter


def register() -> None:
    """Register the backend with vLLM, in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM may call this more than once in a process
        WeightTransferEngineFactory.register_engine(BACKEND, "hybrid_lightning.rollout.vllm.receiver", "GlooReceiver")
