package grammar

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
)

func matches(g *Grammar, text string) bool { return g.Done(g.Walk(g.Start(), []byte(text))) }

func TestSchemasAcceptExactlyWhatTheyDescribe(t *testing.T) {
	for name, c := range map[string]struct {
		schema  string
		yes, no []string
	}{
		"object": {
			`{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"}},"required":["name","age"],"additionalProperties":false}`,
			[]string{`{"name":"Ann","age":7}`, `{"name": "Z\u00fcrich \"x\"", "age": -12}`, "{\n  \"name\": \"é😀\",\n  \"age\": 0\n}"},
			[]string{`{"age":7,"name":"Ann"}`, `{"name":"Ann"}`, `{"name":"Ann","age":07}`, `{"name":"Ann","age":7,}`, `{"name":"a` + "\n" + `","age":7}`, `{"name":"` + "\xff" + `","age":7}`, `[]`, ``},
		},
		"optional": {
			`{"type":"object","properties":{"a":{"type":"boolean"},"b":{"type":"null"},"c":{"type":"number"}},"required":["b"]}`,
			[]string{`{"b":null}`, `{"a":true,"b":null}`, `{"b":null,"c":1.5e-3}`, `{"a":false, "b":null, "c":2}`},
			[]string{`{}`, `{"a":true}`, `{,"b":null}`, `{"b":null,}`, `{"b":null,"a":true}`},
		},
		"array": {
			`{"type":"array","items":{"enum":["x","y",3]},"minItems":1,"maxItems":3}`,
			[]string{`["x"]`, `["x", "y"]`, `[3,3,3]`}, []string{`[]`, `["z"]`, `["x","x","x","x"]`, `["x",]`},
		},
		"itself": {
			`{"$ref":"#/$defs/tree","$defs":{"tree":{"type":"object","properties":{"v":{"type":"integer"},"kids":{"type":"array","items":{"$ref":"#/$defs/tree"}}},"required":["v","kids"]}}}`,
			[]string{`{"v":1,"kids":[]}`, `{"v":1,"kids":[{"v":2,"kids":[{"v":3,"kids":[]}]}]}`}, []string{`{"v":1}`, `{"v":1,"kids":[{}]}`},
		},
		"length": {
			`{"type":"string","minLength":2,"maxLength":3}`,
			[]string{`"ab"`, `"äöü"`, `"\n\n"`}, []string{`"a"`, `"abcd"`},
		},
		"choice": {
			`{"anyOf":[{"type":"string"},{"type":["integer","null"]},{"const":{"k":[1,"a"]}}]}`,
			[]string{`"s"`, `1`, `null`, `{"k":[1,"a"]}`}, []string{`1.5`, `{"k":[1]}`, `true`},
		},
		"open": {
			`{"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":{"type":"boolean"}}`,
			[]string{`{}`, `{"a":1}`, `{"a":1,"z":true}`, `{"z":true,"y":false}`}, []string{`{"z":1}`},
		},
		"tuple": {`{"type":"array","prefixItems":[{"type":"integer"},{"type":"string"}]}`, []string{`[1,"a"]`}, []string{`[1]`, `["a",1]`}},
		"all":   {`{"allOf":[{"properties":{"a":{"type":"integer"}},"required":["a"]},{"properties":{"b":{"type":"integer"}}}]}`, []string{`{"a":1}`, `{"a":1,"b":2}`}, []string{`{}`, `{"b":1}`}},
	} {
		g, err := Schema(json.RawMessage(c.schema), true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, s := range c.yes {
			if !matches(g, s) {
				t.Errorf("%s refuses %s", name, s)
			}
		}
		for _, s := range c.no {
			if matches(g, s) {
				t.Errorf("%s accepts %q", name, s)
			}
		}
	}
}

func TestAnyJSONObjectIsAccepted(t *testing.T) {
	g, err := JSON()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{`{}`, `{"a":[1,2,{"b":null}],"c":"d"}`, `{"a": -0.5E+10}`} {
		if !matches(g, s) {
			t.Errorf("refuses %s", s)
		}
	}
	for _, s := range []string{`[]`, `{"a"}`, `{"a":1}}`, `{"a":tru}`} {
		if matches(g, s) {
			t.Errorf("accepts %s", s)
		}
	}
}

func TestSchemasThatMakeNoSenseAreRefused(t *testing.T) {
	for _, s := range []string{
		``, `{`, `3`, `{"type":"colour"}`, `{"enum":[]}`, `{"$ref":"#/$defs/none"}`, `{"$ref":"#"}`, `{"type":"integer","multipleOf":3}`,
		`{"type":"array","minItems":4,"maxItems":2}`, `{"type":"string","maxLength":1e9}`, `{} {}`, strings.Repeat(`{"items":`, 100) + `1` + strings.Repeat(`}`, 100),
	} {
		if _, err := Schema(json.RawMessage(s), true); err == nil {
			t.Errorf("%s was taken", s)
		}
	}
}

// Random walks along what the mask allows end in text that the schema describes.
//
// conformance: L1
func TestTextUnderAMaskIsOfTheForm(t *testing.T) {
	var texts [][]byte
	for b := range 256 {
		texts = append(texts, []byte{byte(b)})
	}
	for _, s := range []string{`{"`, `":`, `": `, `name`, `",`, `"}`, `}]`, `, "`, "\n  ", `true`, `"a"`, `tags`, "é", "日本", `\"`, `12`, `]}`, ``} {
		texts = append(texts, []byte(s))
	}
	vocab := NewVocabulary(texts)
	g, err := Schema(json.RawMessage(`{"type":"object","properties":{"name":{"type":"string","maxLength":12},
		"tags":{"type":"array","items":{"type":"string","maxLength":3},"maxItems":3},"n":{"type":"integer"}},"required":["name","tags"],"additionalProperties":false}`), true)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		m, out := NewMatcher(g, vocab), []byte{}
		for !m.Over() {
			mask := m.Allowed()
			var allowed []int
			for i := range texts {
				if mask.Has(int32(i)) {
					allowed = append(allowed, i)
				}
				if want := len(texts[i]) > 0 && m.Fork().Accept(texts[i]); want != mask.Has(int32(i)) {
					t.Fatalf("after %q, token %q: mask says %v", out, texts[i], !want)
				}
			}
			if len(allowed) == 0 {
				t.Fatalf("nothing may follow %q", out)
			}
			pick := texts[allowed[rnd.IntN(len(allowed))]]
			m.Accept(pick)
			out = append(out, pick...)
		}
		var v struct {
			Name *string
			Tags []string
		}
		var any map[string]any
		if err := json.Unmarshal(out, &any); err != nil || any["name"] == nil {
			t.Fatalf("%q: %v", out, err)
		}
		if err := json.Unmarshal(out, &v); err != nil || v.Name == nil || len(v.Tags) > 3 {
			t.Fatalf("%q: %v", out, err)
		}
	}
}

func FuzzSchema(f *testing.F) {
	for _, s := range []string{`{"type":"object","properties":{"a":{"$ref":"#"}}}`, `{"anyOf":[{"$ref":"#/anyOf/0"}]}`, `{"enum":[1,"a",null]}`, `true`} {
		f.Add([]byte(s), []byte(`{"a":1}`))
	}
	f.Fuzz(func(t *testing.T, schema, text []byte) {
		g, err := Schema(schema, false)
		if err != nil {
			return
		}
		if s := g.Walk(g.Start(), text); s != Dead && g.Done(s) && !json.Valid(text) {
			t.Errorf("%q is of the form %q and no JSON", text, schema)
		}
	})
}
