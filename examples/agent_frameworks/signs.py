"""`Signs`: TextArena's GuessTheNumber in the signs that the embedded policy can read, which has no letters."""

from textarena_games import TextArena


class Signs(TextArena):
    """A guess such as `12` goes in as `[12]`. Of the answer `>` remains of higher, `<` of lower, and `?` of anything else."""

    def start(self, prompt, seed):
        """Reset the game, and drop its rules."""
        super().start(prompt, seed)

    def step(self, message):
        """Make a guess. Only the number itself earns a reward: the game also pays for a last guess that is close."""
        text, reward, over = super().step({**message, "content": f"[{message['content']}]"})
        return ">" if "is higher" in text else "<" if "is lower" in text else "?", float(over and reward == 1), over
