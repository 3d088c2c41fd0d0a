package e2b

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// listedTemplate is one template in a list.
type listedTemplate struct {
	TemplateID  string          `json:"templateID"`
	BuildID     string          `json:"buildID"`
	BuildStatus node.BuildState `json:"buildStatus"`
	CPUCount    int             `json:"cpuCount"`
	MemoryMB    int64           `json:"memoryMB"`
	DiskSizeMB  int64           `json:"diskSizeMB"`
	EnvdVersion string          `json:"envdVersion"`
	CreatedBy   *struct{}       `json:"createdBy"` // null: keys belong to teams, not to users
	BuildCount  int             `json:"buildCount"`
	templateHead
	UpdatedAt time.Time `json:"updatedAt"`
}

// templateHead is what all views of a template share.
type templateHead struct {
	Public        bool       `json:"public"`
	Aliases       []string   `json:"aliases"`
	Names         []string   `json:"names"` // with the team before them
	CreatedAt     time.Time  `json:"createdAt"`
	LastSpawnedAt *time.Time `json:"lastSpawnedAt"`
	SpawnCount    int64      `json:"spawnCount"`
}

// templateWithBuilds is one template with a page of its builds.
type templateWithBuilds struct {
	TemplateID string `json:"templateID"`
	templateHead
	UpdatedAt time.Time       `json:"updatedAt"`
	Builds    []templateBuild `json:"builds"`
}

type templateBuild struct {
	BuildID     string          `json:"buildID"`
	Status      node.BuildState `json:"status"`
	CreatedAt   time.Time       `json:"createdAt"`
	UpdatedAt   time.Time       `json:"updatedAt"`
	FinishedAt  *time.Time      `json:"finishedAt,omitempty"`
	CPUCount    int             `json:"cpuCount"`
	MemoryMB    int64           `json:"memoryMB"`
	DiskSizeMB  int64           `json:"diskSizeMB"`
	EnvdVersion string          `json:"envdVersion"`
}

// buildUUID is a build's ID in the form that clients insist on. It is made from
// the node's own ID, so that nothing has to remember it.
func buildUUID(id string) string {
	h := sha256.Sum256([]byte("build " + id))
	h[6] = h[6]&0x0f | 0x80 // version 8: made in a way of our own
	h[8] = h[8]&0x3f | 0x80 // variant of RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[0:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

// buildOf finds a template's build by the ID that clients know.
func buildOf(t node.Template, uuid string) (node.Build, error) {
	for _, b := range t.Builds {
		if buildUUID(b.ID) == uuid {
			return b, nil
		}
	}
	return node.Build{}, notFound("template %s has no build %q", t.ID, uuid)
}

// headOf renders what all views share.
func headOf(t node.Template) templateHead {
	h := templateHead{
		Public: t.Public, Aliases: slices.Clone(t.Names), Names: make([]string, 0, len(t.Names)),
		CreatedAt: t.Created, LastSpawnedAt: t.LastUsed, SpawnCount: t.Spawns,
	}
	if h.Aliases == nil {
		h.Aliases = []string{}
	}
	for _, name := range t.Names {
		h.Names = append(h.Names, t.Team+"/"+name)
	}
	return h
}

func templateListed(t node.Template) listedTemplate {
	size := sizeOf(t.Resources)
	l := listedTemplate{
		TemplateID: t.ID, CPUCount: size.cpus, MemoryMB: size.memoryMB, DiskSizeMB: size.diskMB,
		EnvdVersion: wire.Version, BuildCount: len(t.Builds), templateHead: headOf(t), UpdatedAt: t.Updated,
		BuildStatus: node.BuildWaiting,
	}
	if len(t.Builds) > 0 {
		l.BuildStatus, l.BuildID = t.Builds[0].State, buildUUID(t.Builds[0].ID)
	}
	for _, b := range t.Builds { // the newest that can be used, if any
		if b.State == node.BuildReady {
			l.BuildID = buildUUID(b.ID)
			break
		}
	}
	return l
}

func buildListed(b node.Build) templateBuild {
	size := sizeOf(b.Resources)
	return templateBuild{
		BuildID: buildUUID(b.ID), Status: b.State, CreatedAt: b.Created, UpdatedAt: valueOr(b.Finished, b.Created), FinishedAt: b.Finished,
		CPUCount: size.cpus, MemoryMB: size.memoryMB, DiskSizeMB: size.diskMB, EnvdVersion: wire.Version,
	}
}

// findTemplate returns the template that ref means to the team, its own before
// public ones, and the build that ref's tag chooses (empty for the default).
func (a *api) findTemplate(ctx context.Context, team, ref string) (t node.Template, build string, err error) {
	missing := notFound("template %q not found", ref)
	want, err := parseReference(ref)
	if err != nil {
		return t, "", missing
	}
	usable := a.node.Templates(ctx, team)
	match := func(t node.Template) bool {
		return (t.ID == want.name || slices.Contains(t.Names, want.name)) && (want.team == "" || want.team == t.Team)
	}
	i := slices.IndexFunc(usable, func(t node.Template) bool { return t.Team == team && match(t) })
	if i < 0 {
		i = slices.IndexFunc(usable, match)
	}
	switch {
	case i >= 0:
		t = usable[i]
	case want.name == node.BaseTemplate && want.team == "":
		// Every node has it, though it may have to be made first.
		if t, err = a.node.EnsureBase(ctx, nil); err != nil {
			return t, "", err
		}
	default:
		return t, "", missing
	}
	if want.tag == "" || want.tag == defaultTag {
		return t, "", nil
	}
	build, ok := t.Tags[want.tag]
	if !ok {
		return t, "", notFound("template %q has no tag %q", want.name, want.tag)
	}
	return t, build, nil
}

// ownTemplate returns a template that the team may change.
func (a *api) ownTemplate(ctx context.Context, team, ref string) (node.Template, error) {
	t, _, err := a.findTemplate(ctx, team, ref)
	if err != nil {
		return t, err
	}
	if t.Team != team {
		return t, sandbox.Errorf("e2b", sandbox.Denied, "", "template %q belongs to another team", ref)
	}
	return t, nil
}

// aliasOf is the first name of the template that a sandbox came from.
func (a *api) aliasOf(sb node.Sandbox) string {
	if sb.Template == "" || sb.Spec.Labels[labelTemplate] != "" {
		return ""
	}
	t, err := a.node.GetTemplate(context.Background(), sb.Template)
	if err != nil || len(t.Names) == 0 {
		return ""
	}
	return t.Names[0]
}

// isFrom reports whether a sandbox came from the template called ref.
func (a *api) isFrom(ctx context.Context, team string, sb node.Sandbox, ref string) bool {
	if templateOf(sb) == ref {
		return true
	}
	t, build, err := a.findTemplate(ctx, team, ref)
	return err == nil && templateOf(sb) == t.ID && (build == "" || build == sb.Build)
}

// ownTemplates lists what the team made, newest first.
func (a *api) ownTemplates(ctx context.Context, team string) []node.Template {
	return slices.DeleteFunc(a.node.Templates(ctx, team), func(t node.Template) bool { return t.Team != team })
}

func (a *api) listTemplates(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	if !a.ownTeam(w, r, key, r.URL.Query().Get("teamID")) {
		return
	}
	out := []listedTemplate{}
	for _, t := range a.ownTemplates(r.Context(), key.Team) {
		out = append(out, templateListed(t))
	}
	writeJSON(w, http.StatusOK, out)
}

func (a *api) pageTemplates(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q := r.URL.Query()
	if !a.ownTeam(w, r, key, q.Get("teamID")) {
		return
	}
	limit, err := parseLimit(q.Get("limit"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	after, err := parseCursor(q.Get("nextToken"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	part, token := page(a.ownTemplates(r.Context(), key.Team), func(t node.Template) cursor { return cursor{at: t.Created, id: t.ID} }, after, limit, false)
	out := make([]listedTemplate, 0, len(part))
	for _, t := range part {
		out = append(out, templateListed(t))
	}
	writePage(w, token, out)
}

// ownTeam answers a request about another team; empty means the caller's.
func (a *api) ownTeam(w http.ResponseWriter, r *http.Request, key tenant.Key, team string) bool {
	if team == "" || team == key.Team {
		return true
	}
	a.fail(w, r, sandbox.Errorf("e2b", sandbox.Denied, "", "the API key does not belong to team %q", team))
	return false
}

func (a *api) getTemplate(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q := r.URL.Query()
	limit, err := parseLimit(q.Get("limit"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	after, err := parseCursor(q.Get("nextToken"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	t, _, err := a.findTemplate(r.Context(), key.Team, r.PathValue("id"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	part, token := page(slices.Clone(t.Builds), func(b node.Build) cursor { return cursor{at: b.Created, id: b.ID} }, after, limit, false)
	out := templateWithBuilds{TemplateID: t.ID, templateHead: headOf(t), UpdatedAt: t.Updated, Builds: make([]templateBuild, 0, len(part))}
	for _, b := range part {
		out.Builds = append(out.Builds, buildListed(b))
	}
	writePage(w, token, out)
}

// deleteTemplate also deletes snapshots, which to clients are templates.
func (a *api) deleteTemplate(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	ref := r.PathValue("id")
	t, err := a.ownTemplate(r.Context(), key.Team, ref)
	switch {
	case err == nil:
		err = a.node.RemoveTemplate(r.Context(), t.ID)
	case sandbox.Is(err, sandbox.NotFound):
		snap, ok, e := a.findSnapshot(r.Context(), key.Team, ref)
		if e != nil || !ok {
			err = cmp.Or(e, err)
			break
		}
		err = a.node.RemoveSnapshot(r.Context(), snap.ID)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// publish changes who may use a template and returns its names.
func (a *api) publish(w http.ResponseWriter, r *http.Request, key tenant.Key) (names []string, ok bool) {
	body := struct {
		Public *bool `json:"public"`
	}{}
	if !a.decode(w, r, &body) {
		return nil, false
	}
	t, err := a.ownTemplate(r.Context(), key.Team, r.PathValue("id"))
	if err == nil && body.Public != nil {
		t, err = a.node.UpdateTemplate(r.Context(), t.ID, func(t *node.Template) error {
			t.Public = *body.Public
			return nil
		})
	}
	if err != nil {
		a.fail(w, r, err)
		return nil, false
	}
	return headOf(t).Names, true
}

func (a *api) updateTemplateV1(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	if _, ok := a.publish(w, r, key); ok {
		writeJSON(w, http.StatusOK, struct{}{})
	}
}

func (a *api) updateTemplate(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	if names, ok := a.publish(w, r, key); ok {
		writeJSON(w, http.StatusOK, struct {
			Names []string `json:"names"`
		}{names})
	}
}

// aliasOrTags serves /templates/aliases/{alias} and /templates/{id}/tags, which
// the router cannot tell apart.
func (a *api) aliasOrTags(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	switch id, what := r.PathValue("id"), r.PathValue("what"); {
	case id == "aliases":
		a.getAlias(w, r, key, what)
	case what == "tags":
		a.listTags(w, r, key, id)
	default:
		a.fail(w, r, notFound("there is no %s %s here", r.Method, r.URL.Path))
	}
}

// getAlias tells whether a name is taken, and by whose template.
func (a *api) getAlias(w http.ResponseWriter, r *http.Request, key tenant.Key, alias string) {
	t, err := a.node.GetTemplate(r.Context(), alias)
	switch {
	case sandbox.Is(err, sandbox.NotFound) && alias == node.BaseTemplate:
		t, err = node.Template{ID: node.BaseTemplate, Public: true}, nil // made when first used
	case sandbox.Is(err, sandbox.NotFound):
		t, _, err = a.findTemplate(r.Context(), key.Team, alias) // with a team or tag in it
	case err == nil && t.Team != key.Team && !t.Public:
		err = sandbox.Errorf("e2b", sandbox.Denied, "", "template %q belongs to another team", alias)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, struct {
		TemplateID string `json:"templateID"`
		Public     bool   `json:"public"`
	}{t.ID, t.Public})
}
