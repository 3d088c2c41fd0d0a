package native

import (
	"cmp"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/jsonschema-go/jsonschema"
)

// describe derives the OpenAPI 3.1 document from the routes that serve it, so
// that the two cannot differ.
func describe(all []route) map[string]any {
	s := newSchemas(all)
	paths := map[string]map[string]any{}
	for _, rt := range all {
		if paths[rt.path] == nil {
			paths[rt.path] = map[string]any{}
		}
		paths[rt.path][strings.ToLower(rt.method)] = s.operation(rt)
	}
	return map[string]any{
		"openapi": "3.1.0",
		"info":    map[string]any{"title": "Atoll", "version": "v1", "description": "The native API of an Atoll node. Durations are integers in nanoseconds, sizes in bytes."},
		"paths":   paths,
		"components": map[string]any{
			"schemas": s.named,
			"securitySchemes": map[string]any{
				"key":    map[string]any{"type": "apiKey", "in": "header", "name": "X-API-Key"},
				"bearer": map[string]any{"type": "http", "scheme": "bearer"},
			},
		},
		"security": []any{map[string]any{"key": []string{}}, map[string]any{"bearer": []string{}}},
	}
}

// schemas gives every struct of ours a name and refers to it everywhere else.
type schemas struct {
	named map[string]*jsonschema.Schema
	refs  map[reflect.Type]*jsonschema.Schema // of each named type, a reference
}

func newSchemas(all []route) *schemas {
	s := &schemas{named: map[string]*jsonschema.Schema{}, refs: map[reflect.Type]*jsonschema.Schema{
		reflect.TypeFor[time.Duration](): {Type: "integer", Description: "nanoseconds"},
		reflect.TypeFor[time.Time]():     {Type: "string", Format: "date-time"},
	}}
	found := map[reflect.Type]bool{}
	for _, rt := range all {
		collect(rt.in, found)
		collect(rt.out, found)
	}
	collect(reflect.TypeFor[Problem](), found)
	var types []reflect.Type
	for t := range found {
		types = append(types, t)
	}
	// Shorter names first, so that the same type has the same name each time.
	slices.SortFunc(types, func(a, b reflect.Type) int { return cmp.Compare(a.String(), b.String()) })
	name := map[reflect.Type]string{}
	taken := map[string]bool{}
	for _, t := range types {
		n := t.Name()
		if taken[n] {
			n = exported(t.String())
		}
		taken[n], name[t] = true, n
		s.refs[t] = &jsonschema.Schema{Ref: "#/components/schemas/" + n}
	}
	for _, t := range types {
		self := s.refs[t]
		delete(s.refs, t) // its own definition is spelled out
		s.named[name[t]] = s.schema(t)
		s.refs[t] = self
	}
	return s
}

// exported turns "image.Info" into "ImageInfo".
func exported(name string) string {
	var b strings.Builder
	for part := range strings.SplitSeq(name, ".") {
		b.WriteString(strings.ToUpper(part[:1]) + part[1:])
	}
	return b.String()
}

// collect finds the named structs of this module that a type is made of.
// Generic ones (frames) are spelled out where they are used.
func collect(t reflect.Type, found map[reflect.Type]bool) {
	if t == nil || found[t] {
		return
	}
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map:
		collect(t.Elem(), found)
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return
		}
		if t.Name() != "" && !strings.Contains(t.Name(), "[") && strings.Contains(t.PkgPath(), "/atoll/") {
			found[t] = true
		}
		for f := range t.Fields() {
			if f.IsExported() {
				collect(f.Type, found)
			}
		}
	}
}

// schema returns a type's schema. Types are ours and known when this is
// written, and a test describes all routes, so a failure is a defect.
func (s *schemas) schema(t reflect.Type) *jsonschema.Schema {
	if ref, ok := s.refs[t]; ok {
		return ref
	}
	schema, err := jsonschema.ForType(t, &jsonschema.ForOptions{TypeSchemas: s.refs})
	if err != nil {
		panic("native: no schema for " + t.String() + ": " + err.Error()) // a defect that a test finds
	}
	return schema
}

func (s *schemas) operation(rt route) map[string]any {
	op := map[string]any{"summary": rt.summary, "operationId": operationID(rt)}
	var params []any
	for part := range strings.SplitSeq(rt.path, "/") {
		if strings.HasPrefix(part, "{") {
			params = append(params, map[string]any{"name": strings.Trim(part, "{}"), "in": "path", "required": true, "schema": map[string]any{"type": "string"}})
		}
	}
	for _, q := range rt.query {
		params = append(params, map[string]any{"name": q, "in": "query", "schema": map[string]any{"type": "string"}})
	}
	if params != nil {
		op["parameters"] = params
	}
	content := func(media string, schema any) map[string]any {
		return map[string]any{media: map[string]any{"schema": schema}}
	}
	binary := map[string]any{"type": "string", "format": "binary"}
	switch {
	case rt.accepts != "":
		op["requestBody"] = map[string]any{"content": content(rt.accepts, binary)}
	case rt.in != nil:
		op["requestBody"] = map[string]any{"content": content("application/json", s.schema(rt.in))}
	}
	status, answer := http.StatusOK, map[string]any{"description": "done"}
	switch {
	case rt.stream:
		answer["content"] = content(ndjson, s.schema(rt.out))
	case rt.returns != "":
		answer["content"] = content(rt.returns, binary)
	case rt.out != nil:
		answer["content"] = content("application/json", s.schema(rt.out))
	case strings.Contains(rt.path, "/dial/"):
		status = http.StatusSwitchingProtocols
	default:
		status = http.StatusNoContent
	}
	problem := map[string]any{"description": "it failed; kind, detail and hint say why", "content": content("application/problem+json", s.refs[reflect.TypeFor[Problem]()])}
	op["responses"] = map[string]any{strconv.Itoa(status): answer, "default": problem}
	return op
}

// operationID makes "postSandboxesRefFork" of "POST /api/v1/sandboxes/{ref}/fork".
func operationID(rt route) string {
	id := strings.ToLower(rt.method)
	for part := range strings.SplitSeq(strings.TrimPrefix(rt.path, "/api/v1/"), "/") {
		part = strings.Trim(part, "{}")
		id += strings.ToUpper(part[:1]) + part[1:]
	}
	return id
}
