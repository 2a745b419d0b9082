// Renders openapi.json: every operation with its fields, an example for curl, and the statuses.
"use strict";

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function resolved(whole, schema) {
  return schema && schema.$ref ? whole.components.schemas[schema.$ref.split("/").pop()] : schema || {};
}

function typeOf(schema) {
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items || {})}`;
  return schema.type || "any";
}

function fields(rows) {
  const list = element("ul");
  for (const [name, required, schema, meaning] of rows) {
    const line = element("li");
    line.append(element("code", "", name), ` ${typeOf(schema)}${required ? ", required" : ""}. ${meaning || ""}`);
    list.append(line);
  }
  return list;
}

function operation(whole, path, method, about) {
  const section = element("section", "operation"), heading = element("h2");
  heading.append(element("code", "", `${method.toUpperCase()} ${path}`));
  section.append(heading, element("p", "", about.description || about.summary));
  let example = `curl ${location.origin}${path}`;
  if (about.parameters) {
    section.append(fields(about.parameters.map((one) => [one.name, one.required, one.schema, one.description])));
    example += `?${about.parameters.map((one) => `${one.name}=...`).join("&")}`;
  }
  if (about.requestBody) {
    const schema = resolved(whole, about.requestBody.content["application/json"].schema);
    const rows = Object.entries(schema.properties).map(([name, one]) => [name, (schema.required || []).includes(name), one, one.description]);
    section.append(fields(rows));
    const body = { history: ["ID or title"], ...(schema.required ? { candidates: ["ID or title"] } : {}) };
    example += ` -H 'content-type: application/json' -d '${JSON.stringify(body)}'`;
  }
  const code = element("pre");
  code.append(element("code", "", example));
  section.append(code);
  const statuses = Object.entries(about.responses).map(([status, one]) => `${status}: ${one.description}`);
  section.append(element("p", "", statuses.join(" ")));
  return section;
}

document.addEventListener("DOMContentLoaded", async () => {
  const whole = await (await fetch("openapi.json")).json();
  for (const [path, methods] of Object.entries(whole.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      document.getElementById("operations").append(operation(whole, path, method, about));
    }
  }
});
