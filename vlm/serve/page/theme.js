// Light and dark: as the system says, or as the reader has chosen.

const ORDER = ["system", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");

function stored() {
  try {
    return ORDER.includes(localStorage.theme) ? localStorage.theme : "system";
  } catch {
    return "system"; // storage may be forbidden
  }
}

export function followTheme(button) {
  let chosen = stored();
  const show = () => {
    const dark = chosen === "dark" || (chosen === "system" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const words = chosen === "system" ? "as the system" : chosen;
    button.setAttribute("aria-label", `Colours: ${words}`);
    button.title = `Colours: ${words}`;
  };
  button.addEventListener("click", () => {
    chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
    try {
      localStorage.theme = chosen;
    } catch {
      // then it holds until the page is left
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}
