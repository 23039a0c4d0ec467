const folds = () => document.querySelectorAll("details.repeat");
const button = document.getElementById("unfold");
if (button) {
  if (!folds().length) { button.remove(); }
  button.addEventListener("click", () => {
    const open = ![...folds()].every((fold) => fold.open);
    folds().forEach((fold) => { fold.open = open; });
  });
  const label = () => {
    button.textContent = [...folds()].every((fold) => fold.open) ? "fold all" : "unfold all";
  };
  folds().forEach((fold) => fold.addEventListener("toggle", label));
}
document.querySelectorAll("a.box").forEach((box) => box.addEventListener("click", (event) => {
  const step = document.getElementById(box.getAttribute("href").slice(1));
  event.preventDefault();
  event.stopPropagation();
  if (step) { step.open = true; step.scrollIntoView({ behavior: "smooth" }); }
}));
