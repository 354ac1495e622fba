"""What is behind the page of webui_amharic.py.

Without Gradio: workspace (the folder it may touch), command_lines (forms to argv), belonging (files that do not fit
each other), jobs (programs that outlive the page), run_queue (trainings, one after the other), readers (what they
write), recordings_check, pipeline (what one step hands to the next), clip_rows and recorded_texts (rows of a data
set), zip_upload, served_files (links to files), texts. With it: page_base (labels, what is looked at again),
command_form (a form over one command line), job_panel (a job's state, log and curves), the tabs (data_tabs,
training_tab, checkpoints_tab, listen_tab) and whole_page.
"""
