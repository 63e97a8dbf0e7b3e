"""What happens to a result afterwards: gates that refuse it, two of them compared, the Hub."""
