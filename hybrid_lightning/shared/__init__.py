"""What every part may use: it knows neither models nor runs.

configurable.py          classes that a config can name, and their configs
lazy.py                  packages that import their names on first use
stopping.py              signals that end a run
user_code.py             calls of code that users wrote, and what their failures say
user_calls.py            the event loop of user code
explain.py               sections of the troubleshooting page, for a terminal
hub.py                   what a failure to reach the model hub means
quiet.py                 messages of other libraries that nobody needs
reply_cache.py           replies of servers, kept by what they were asked
reasoning_gym_tasks.py   tasks of the library reasoning-gym
"""
