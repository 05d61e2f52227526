"""The paged memory and the scheduler. Standard library only; start with README.md beside this file."""
