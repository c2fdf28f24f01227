"""What can be said of a run: findings that keep it from learning, what rewards pay reference answers, and its page."""
