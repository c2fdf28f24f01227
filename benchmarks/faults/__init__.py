"""Kills processes of jobs, and checks that the jobs end and can resume."""
