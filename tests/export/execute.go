// Executes Go templates, for test_go_template.py: a list of {template, data} in JSON comes on standard
// input, and a list of {text} or {error} goes out.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type request struct {
	Template string `json:"template"`
	Data     any    `json:"data"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

// integers turns JSON's numbers into ints, as the fields of Ollama's structs are.
func integers(value any) any {
	switch v := value.(type) {
	case float64:
		return int(v)
	case []any:
		for i := range v {
			v[i] = integers(v[i])
		}
	case map[string]any:
		for key := range v {
			v[key] = integers(v[key])
		}
	}
	return value
}

func execute(r request) answer {
	parsed, err := template.New("").Option("missingkey=error").Parse(r.Template)
	if err != nil {
		return answer{Error: err.Error()}
	}
	var text strings.Builder
	if err := parsed.Execute(&text, integers(r.Data)); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Text: text.String()}
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	answers := make([]answer, len(requests))
	for i, r := range requests {
		answers[i] = execute(r)
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		panic(err)
	}
}
