package e2b

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// maxTags bounds the tags of one request.
const maxTags = 100

type templateTag struct {
	Tag       string    `json:"tag"`
	BuildID   string    `json:"buildID"`
	CreatedAt time.Time `json:"createdAt"`
}

// listTags lists a template's tags; a snapshot has the one in its name.
func (a *api) listTags(w http.ResponseWriter, r *http.Request, key tenant.Key, ref string) {
	t, _, err := a.findTemplate(r.Context(), key.Team, ref)
	out := []templateTag{}
	switch {
	case err == nil:
		for _, b := range t.Builds {
			for tag, id := range t.Tags {
				if id == b.ID {
					out = append(out, templateTag{Tag: tag, BuildID: buildUUID(b.ID), CreatedAt: valueOr(b.Finished, b.Created)})
				}
			}
		}
		slices.SortFunc(out, func(a, b templateTag) int { return strings.Compare(a.Tag, b.Tag) })
	case sandbox.Is(err, sandbox.NotFound):
		snap, ok, e := a.findSnapshot(r.Context(), key.Team, ref)
		if e != nil || !ok {
			break
		}
		err = nil
		_, tag, _ := strings.Cut(snapshotID(snap), ":")
		out = append(out, templateTag{Tag: tag, BuildID: buildUUID(snap.ID), CreatedAt: snap.Created})
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, out)
}

// readTags checks the tags of a request. Each may be written with the
// template's name before it, as "name:tag".
func readTags(tags []string, name string) ([]string, error) {
	if len(tags) == 0 || len(tags) > maxTags {
		return nil, invalid("between 1 and %d tags are needed", maxTags)
	}
	out := make([]string, 0, len(tags))
	for _, t := range tags {
		if before, after, ok := strings.Cut(t, ":"); ok && before == name {
			t = after
		}
		t, err := parseTag(t)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out, nil
}

// assignTags lets tags mean the build that another tag means.
func (a *api) assignTags(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Target string   `json:"target"`
		Tags   []string `json:"tags"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	b, tags, err := a.tagBuild(r.Context(), key.Team, body.Target, body.Tags)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusCreated, struct {
		BuildID string   `json:"buildID"`
		Tags    []string `json:"tags"`
	}{buildUUID(b.ID), tags})
}

func (a *api) tagBuild(ctx context.Context, team, target string, tags []string) (b node.Build, clean []string, err error) {
	want, err := parseReference(target)
	if err != nil {
		return b, nil, err
	}
	if clean, err = readTags(tags, want.name); err != nil {
		return b, nil, err
	}
	t, err := a.ownTemplate(ctx, team, target)
	if err != nil {
		return b, nil, err
	}
	_, err = a.node.UpdateTemplate(ctx, t.ID, func(t *node.Template) error {
		var ok bool
		if b, ok = taggedBuild(*t, want.tag); !ok {
			return notFound("template %q has no build for this tag yet", target)
		}
		if t.Tags == nil {
			t.Tags = make(map[string]string)
		}
		for _, tag := range clean {
			t.Tags[tag] = b.ID
		}
		return nil
	})
	return b, clean, err
}

// taggedBuild is the build that a tag means; without a tag the default one, or
// else the newest that is ready.
func taggedBuild(t node.Template, tag string) (node.Build, bool) {
	id, named := t.Tags[tag]
	if tag == "" || tag == defaultTag {
		id, named = t.Tags[defaultTag], true
	}
	for _, b := range t.Builds {
		if named && (b.ID == id || id == "" && b.State == node.BuildReady) {
			return b, true
		}
	}
	return node.Build{}, false
}

// removeTags takes tags from a template; its default stays.
func (a *api) removeTags(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	err := a.untag(r.Context(), key.Team, body.Name, body.Tags)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (a *api) untag(ctx context.Context, team, name string, tags []string) error {
	want, err := parseReference(name)
	if err != nil {
		return err
	}
	clean, err := readTags(tags, want.name)
	if err != nil {
		return err
	}
	if slices.Contains(clean, defaultTag) {
		return invalid("the tag %q cannot be removed", defaultTag)
	}
	t, err := a.ownTemplate(ctx, team, name)
	if err != nil {
		return err
	}
	_, err = a.node.UpdateTemplate(ctx, t.ID, func(t *node.Template) error {
		for _, tag := range clean {
			if _, ok := t.Tags[tag]; !ok {
				return notFound("template %q has no tag %q", name, tag)
			}
			delete(t.Tags, tag)
		}
		return nil
	})
	return err
}
