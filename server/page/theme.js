// Runs before the page is drawn: light or dark, as chosen here or as the system says.
{
  const system = matchMedia('(prefers-color-scheme: dark)');
  const chosen = () => {
    try {
      return JSON.parse(localStorage.getItem('duet.theme')) ?? 'auto';
    } catch {
      return 'auto';
    }
  };
  const apply = () => {
    const theme = chosen();
    document.documentElement.dataset.theme = theme === 'light' || theme === 'dark' ? theme : system.matches ? 'dark' : 'light';
  };
  system.addEventListener('change', apply);
  addEventListener('themechange', apply);
  addEventListener('storage', apply);
  apply();
}
