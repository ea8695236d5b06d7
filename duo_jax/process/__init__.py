"""What a process owes the others: how it ends when it is told to, and what only one may write."""
