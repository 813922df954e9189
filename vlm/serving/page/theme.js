// Light and dark theme: that of the system, or the user's choice.

const ORDER = ["system", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");

function stored() {
  try {
    return ORDER.includes(localStorage.theme) ? localStorage.theme : "system";
  } catch {
    return "system"; // storage may be disabled
  }
}

export function followTheme(button) {
  let chosen = stored();
  const show = () => {
    const dark = chosen === "dark" || (chosen === "system" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const words = chosen === "system" ? "system" : chosen;
    button.setAttribute("aria-label", `Theme: ${words}`);
    button.title = `Theme: ${words}`;
  };
  button.addEventListener("click", () => {
    chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
    try {
      localStorage.theme = chosen;
    } catch {
      // the choice is lost after a reload
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}
