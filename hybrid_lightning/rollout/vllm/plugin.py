"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): registers our way to receive weights."""

BACKEND = "hybrid_lightning"  # for --weight-transfer-config '{"backend": "hybrid_lightning"}'


def register() -> None:
    """Register the receiver by its name; the module is imported when a server asks for it."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM may call this more than once in a process
        WeightTransferEngineFactory.register_engine(BACKEND, "hybrid_lightning.rollout.vllm.receiver", "GlooReceiver")
