package native

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// Templates manages named, versioned starting points.
type Templates interface {
	Templates(ctx context.Context, team string) ([]node.Template, error)
	GetTemplate(ctx context.Context, ref string) (node.Template, error)
	RemoveTemplate(ctx context.Context, ref string) error
	// BuildTemplate makes a template, or a new build of one, and returns when it
	// is finished. report, which may be nil, is given the build's log.
	BuildTemplate(ctx context.Context, req TemplateRequest, report func(node.LogLine)) (node.Template, error)
	// TagTemplate makes a tag mean one of the template's builds.
	TagTemplate(ctx context.Context, ref, tag, build string) error
}

// TemplateRequest asks for a template.
type TemplateRequest struct {
	Name      string            `json:"name"`
	Team      string            `json:"team,omitempty"`
	Public    bool              `json:"public,omitempty"`
	Resources sandbox.Resources `json:"resources"`
	Build     node.BuildRequest `json:"build"`
}

// TemplateTagRequest says which build a tag means.
type TemplateTagRequest struct {
	Tag   string `json:"tag"`
	Build string `json:"build"` // ID of a finished build
}

// Templates implements Backend.
func (l *Local) Templates(ctx context.Context, team string) ([]node.Template, error) {
	return l.node.Templates(ctx, team), nil
}

// GetTemplate implements Backend.
func (l *Local) GetTemplate(ctx context.Context, ref string) (node.Template, error) {
	return l.node.GetTemplate(ctx, ref)
}

// RemoveTemplate implements Backend.
func (l *Local) RemoveTemplate(ctx context.Context, ref string) error {
	return l.node.RemoveTemplate(ctx, ref)
}

// lookEvery is how often a build under way is looked at.
const lookEvery = 100 * time.Millisecond

// BuildTemplate implements Backend. The build goes on when ctx ends.
func (l *Local) BuildTemplate(ctx context.Context, req TemplateRequest, report func(node.LogLine)) (node.Template, error) {
	const op = "native.BuildTemplate"
	t, b, err := l.node.CreateTemplate(ctx, node.Template{Names: []string{req.Name}, Team: req.Team, Public: req.Public, Resources: req.Resources})
	if err != nil {
		return node.Template{}, err
	}
	if err := l.node.StartBuild(context.WithoutCancel(ctx), t.ID, b.ID, req.Build); err != nil {
		return node.Template{}, err
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for seen := 0; ; {
		// The state first: what is logged before it changes is then not missed.
		b, err := l.node.BuildStatus(ctx, t.ID, b.ID)
		if err != nil {
			return node.Template{}, err
		}
		lines, err := l.node.BuildLogs(ctx, t.ID, b.ID, seen)
		if err != nil {
			return node.Template{}, err
		}
		seen += len(lines)
		for _, line := range lines {
			if report != nil {
				report(line)
			}
		}
		switch b.State {
		case node.BuildReady:
			return l.node.GetTemplate(ctx, t.ID)
		case node.BuildFailed:
			return node.Template{}, sandbox.Errorf(op, sandbox.Invalid, req.Name, "the build failed: %s", b.Reason)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return node.Template{}, sandbox.E(op, "", req.Name, ctx.Err()).WithHint("the build goes on; see `atoll template inspect`")
		}
	}
}

// TagTemplate implements Backend.
func (l *Local) TagTemplate(ctx context.Context, ref, tag, build string) error {
	const op = "native.TagTemplate"
	if tag == "" {
		return sandbox.Errorf(op, sandbox.Invalid, ref, "the tag is missing")
	}
	_, err := l.node.UpdateTemplate(ctx, ref, func(t *node.Template) error {
		for _, b := range t.Builds {
			if b.ID == build && b.State == node.BuildReady {
				if t.Tags == nil {
					t.Tags = map[string]string{}
				}
				t.Tags[tag] = build
				return nil
			}
		}
		return sandbox.Errorf(op, sandbox.NotFound, build, "the template has no finished build of this ID")
	})
	return err
}

// Templates implements Backend.
func (c *Client) Templates(ctx context.Context, team string) ([]node.Template, error) {
	return ask[[]node.Template](ctx, c, "native.Templates", http.MethodGet, "/templates", queryOf("team", team), nil)
}

// GetTemplate implements Backend.
func (c *Client) GetTemplate(ctx context.Context, ref string) (node.Template, error) {
	return ask[node.Template](ctx, c, "native.GetTemplate", http.MethodGet, "/templates/"+url.PathEscape(ref), nil, nil)
}

// RemoveTemplate implements Backend.
func (c *Client) RemoveTemplate(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.RemoveTemplate", http.MethodDelete, "/templates/"+url.PathEscape(ref), nil, nil)
}

// BuildTemplate implements Backend.
func (c *Client) BuildTemplate(ctx context.Context, req TemplateRequest, report func(node.LogLine)) (node.Template, error) {
	return follow[node.LogLine, node.Template](ctx, c, "native.BuildTemplate", "/templates", nil, req, report)
}

// TagTemplate implements Backend.
func (c *Client) TagTemplate(ctx context.Context, ref, tag, build string) error {
	return c.tell(ctx, "native.TagTemplate", http.MethodPost, "/templates/"+url.PathEscape(ref)+"/tags", nil, TemplateTagRequest{Tag: tag, Build: build})
}

func (s scoped) Templates(ctx context.Context, _ string) ([]node.Template, error) {
	return s.Backend.Templates(ctx, s.team)
}

// ownTemplate returns a template that the team may see; to change it, it must
// be the team's own.
func (s scoped) ownTemplate(ctx context.Context, ref string, change bool) (node.Template, error) {
	t, err := s.Backend.GetTemplate(ctx, ref)
	if err != nil {
		return t, err
	}
	switch {
	case t.Team == s.team || t.Public && !change:
		return t, nil
	case t.Public:
		return t, s.denied("changing a template of another team")
	}
	return node.Template{}, sandbox.Errorf("native.GetTemplate", sandbox.NotFound, ref, "no such template")
}

func (s scoped) GetTemplate(ctx context.Context, ref string) (node.Template, error) {
	return s.ownTemplate(ctx, ref, false)
}

func (s scoped) BuildTemplate(ctx context.Context, req TemplateRequest, report func(node.LogLine)) (node.Template, error) {
	refs := []string{req.Build.FromImage, req.Build.FromTemplate}
	for _, step := range req.Build.Steps {
		if step.Archive != "" {
			return node.Template{}, s.denied("copying from a file of the host")
		}
		refs = append(refs, step.From)
	}
	for _, ref := range refs {
		if err := s.mayStart(ctx, ref); err != nil {
			return node.Template{}, err
		}
	}
	req.Team = s.team
	return s.Backend.BuildTemplate(ctx, req, report)
}

func (s scoped) RemoveTemplate(ctx context.Context, ref string) error {
	t, err := s.ownTemplate(ctx, ref, true)
	if err != nil {
		return err
	}
	return s.Backend.RemoveTemplate(ctx, t.ID)
}

func (s scoped) TagTemplate(ctx context.Context, ref, tag, build string) error {
	t, err := s.ownTemplate(ctx, ref, true)
	if err != nil {
		return err
	}
	return s.Backend.TagTemplate(ctx, t.ID, tag, build)
}

func templateRoutes() []route {
	return []route{
		on("GET", "/api/v1/templates", "List templates", func(c *call, _ none) ([]node.Template, error) {
			return c.backend.Templates(c.ctx, c.r.URL.Query().Get("team"))
		}, "team"),
		onStream("POST", "/api/v1/templates", "Make a template, or a new build of one", func(c *call, in TemplateRequest, report func(node.LogLine)) (node.Template, error) {
			return c.backend.BuildTemplate(c.ctx, in, report)
		}),
		on("GET", "/api/v1/templates/{ref}", "One template, with its builds", func(c *call, _ none) (node.Template, error) {
			return c.backend.GetTemplate(c.ctx, c.ref())
		}),
		on("DELETE", "/api/v1/templates/{ref}", "Remove a template and its builds", func(c *call, _ none) (none, error) {
			return none{}, c.backend.RemoveTemplate(c.ctx, c.ref())
		}),
		on("POST", "/api/v1/templates/{ref}/tags", "Make a tag mean one of the builds", func(c *call, in TemplateTagRequest) (none, error) {
			return none{}, c.backend.TagTemplate(c.ctx, c.ref(), in.Tag, in.Build)
		}),
	}
}
