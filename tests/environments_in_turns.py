"""`EnvironmentsInTurns`: the environments of a rollout without a policy. All episodes are in the same turn."""

import asyncio
from contextlib import nullcontext

from hybrid_lightning.environments import RunningEpisodes
from hybrid_lightning.shared.user_calls import LoopLostError, run_async


class EnvironmentsInTurns:
    """Takes the arguments of `RunningEpisodes`; each method waits for all episodes."""

    def __init__(self, *arguments, **options):
        self.running = RunningEpisodes(*arguments, **options)
        self.close = self.running.close

    def start(self, prompts, seeds):
        """The answers to `start`, in order."""
        run_async(self.running.finish(), self.running.blocked_s)
        self.running.begin(len(prompts))
        calls = {number: self.running.start(number, *given) for number, given in enumerate(zip(prompts, seeds, strict=True))}
        return list(self._all("start", calls).values())

    def step(self, messages):
        """Episode number -> the answer to its message."""
        return self._all("step", {number: self.running.step(number, message) for number, message in messages.items()})

    def conclude(self, numbers):
        """Episode number -> its final reward."""
        return self._all("final reward", {number: self.running.conclude(number) for number in numbers})

    def _all(self, kind, calls):
        answers, running = {}, self.running

        async def one(number, call):
            answers[number] = await call

        async def together():
            tasks = [asyncio.create_task(one(*item)) for item in calls.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        with nullcontext() if running.limits.workers else running.process_kept():
            try:
                run_async(together(), running.blocked_s)
            except LoopLostError:
                answers |= {number: running.lost(number, kind) for number in calls.keys() - answers.keys()}
        return {number: answers[number] for number in calls}
